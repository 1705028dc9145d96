"""Blocks that add in another expression in training mode than in evaluation."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 8


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        if self.training:
            return nn.functional.dropout(self.branch(x), 0.5) + x
        return x + self.branch(x)

    def branch(self, x):
        return self.linear(self.norm(x))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(TwoWays() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Trunk(Blocks):
    """Adds in its own loops."""

    def forward(self, x):
        if self.training:
            for block in self.blocks:
                x = nn.functional.dropout(block.branch(x), 0.5) + x
            return x
        for block in self.blocks:
            x = x + block.linear(block.norm(x))
        return x


@pytest.mark.parametrize(("kind", "way"), [(Blocks, "slice"), (Trunk, "deferred")])
def test_one_gate_closes_what_is_added_in_training_and_in_evaluation(kind, way):
    x = torch.randn(3, WIDTH)
    original, model = kind(), kind()
    handle = sd.apply(model, sd.Uniform(0.5), example=x)
    assert [block.mechanism for block in applied_to(model).found] == [way] * 3
    called = []
    for n, block in enumerate(model.blocks):
        block.linear.register_forward_pre_hook(lambda *_, n=n: called.append(n))
    for training, pattern in itertools.product((True, False), itertools.product((0, 1), repeat=3)):
        model.train(training)
        called.clear()
        torch.manual_seed(1)
        with handle.forced([bool(is_open) for is_open in pattern]):
            found = model(x)
        assert called == [n for n in range(3) if pattern[n]]
        torch.manual_seed(1)
        expected = x
        for n in called:
            branch = original.blocks[n].branch(expected)
            expected = expected + nn.functional.dropout(branch, 0.5, training)
        torch.testing.assert_close(found, expected)


class WithHead(Blocks):
    """In training mode a head of its own looks on."""

    def __init__(self) -> None:
        super().__init__()
        self.head = TwoWays()

    def forward(self, x):
        x = super().forward(x)
        return (x, self.head(x)) if self.training else x


def test_what_runs_in_training_mode_alone_is_a_block():
    plan = sd.plan(WithHead(), torch.randn(3, WIDTH))
    alone = {block.name: block.training_only for block in plan.blocks}
    assert alone == {"blocks.0": False, "blocks.1": False, "blocks.2": False, "head": True}


def test_units_of_their_own_keep_one_gate_in_both_modes():
    x = torch.randn(3, WIDTH)
    handle = sd.apply(Blocks(), sd.Uniform(0.5), example=x, granularity="unit")
    assert [block.name for block in handle.blocks] == ["blocks.0", "blocks.1", "blocks.2"]


class SecondInTwoWays(nn.Module):
    """Its second addition differs in training mode, and so does its first one if `both`."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.first, self.second, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), both

    def forward(self, x):
        if self.training and self.both:
            x = torch.tanh(self.first(x)) + x
        else:
            x = x + torch.tanh(self.first(x))
        if self.training:
            return torch.tanh(self.second(x)) + x
        return x + torch.tanh(self.second(x))


class SecondInTwoWaysOfALoop(nn.Module):
    def __init__(self, both: bool) -> None:
        super().__init__()
        self.both = both
        self.blocks = nn.ModuleList(SecondInTwoWays(both) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            if self.training and self.both:
                x = torch.tanh(block.first(x)) + x
            else:
                x = x + torch.tanh(block.first(x))
            if self.training:
                x = torch.tanh(block.second(x)) + x
            else:
                x = x + torch.tanh(block.second(x))
        return x


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("way", ["slice", "deferred"])
def test_a_unit_that_training_mode_adds_differently_keeps_its_own_gate(way, both):
    x = torch.randn(3, WIDTH)
    if way == "slice":
        model = nn.Sequential(SecondInTwoWays(both), SecondInTwoWays(both))
        blocks = list(model)
    else:
        model = SecondInTwoWaysOfALoop(both)
        blocks = list(model.blocks)
    parts = [part for block in blocks for part in (block.first, block.second)]
    handle = sd.apply(model, sd.Uniform(0.5), example=x, granularity="unit")
    assert [block.mechanism for block in applied_to(model).found] == [way] * 4
    for training, pattern in itertools.product((True, False), itertools.product((0, 1), repeat=4)):
        expected = x
        for is_open, part in zip(pattern, parts, strict=True):
            expected = expected + torch.tanh(part(expected)) if is_open else expected
        with handle.forced([bool(is_open) for is_open in pattern]):
            torch.testing.assert_close(model.train(training)(x), expected)


class Branching(nn.Module):
    """A block whose forward method takes another way if there is a mask."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(6, 6)


class InIf(Branching):
    def forward(self, x, mask=None):
        if mask is None:  # noqa: SIM108
            x = x + self.f(x)
        else:
            x = x + self.f(x * mask)
        return x


class BeforeReturn(Branching):
    def forward(self, x, mask=None):
        if mask is not None:
            return x + self.f(x * mask)
        return x + self.f(x)


class InExpression(Branching):
    def forward(self, x, mask=None):
        return x + self.f(x) if mask is None else x + self.f(x * mask)


class Nested(Branching):
    def forward(self, x, mask=None):
        if x.ndim == 2:
            if mask is None:
                return self.f(x) + x
            x = self.f(x * mask) + x
        return x


class Through(nn.Module):
    """Blocks that take a mask."""

    def __init__(self, kind):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x


@pytest.mark.parametrize("kind", [InIf, BeforeReturn, InExpression, Nested])
@pytest.mark.parametrize("masked", [False, True])
def test_another_way_through_a_block_than_on_the_example_is_warned_of(kind, masked):
    model, x, mask = Through(kind), torch.randn(4, 6), torch.ones(6)
    handle = sd.apply(model, example=(x, mask) if masked else x)
    assert {found.mechanism for found in applied_to(model).found} == {"slice"}
    as_shown, otherwise = ((x, mask), (x,)) if masked else ((x,), (x, mask))
    with handle.forced([False] * 3):
        assert torch.equal(model(*as_shown), x)
        with pytest.warns(
            sd.errors.BypassedAdditionWarning, match=f"{kind.__name__}.forward, line .* did not run"
        ):
            assert not torch.equal(model(*otherwise), x)
    with handle.forced([True] * 3):
        model.train()(*otherwise)


class Skips(Branching):
    def forward(self, x, mask=None):
        if mask is not None:
            return x
        if x.ndim == 3:
            raise ValueError("two dimensions are needed")
        return x + self.f(x)


def test_a_way_that_runs_nothing_is_not_warned_of():
    model, x = Through(Skips), torch.randn(4, 6)
    handle = sd.apply(model, example=x)
    with handle.forced([False] * 3):
        assert torch.equal(model(x, torch.ones(6)), x)
        with pytest.raises(ValueError, match="two dimensions"):
            model(x[None])


class Decoder(Branching):
    """Has a further addition if there is a context."""

    def __init__(self):
        super().__init__()
        self.cross, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, context=None):
        x = x + self.f(x)
        if context is not None:
            x = x + self.cross(context)
        return x + self.last(x)


class DecoderInSteps(Decoder):
    def forward(self, x, context=None):
        shortcut = x
        x = self.f(x)
        x = shortcut + x
        if context is not None:
            shortcut = x
            x = self.cross(context)
            x = shortcut + torch.relu(x)
        return x


class DecoderInPlace(Decoder):
    def forward(self, x, context=None):
        x = x + self.f(x)
        if context is not None:
            x += self.cross(context)
        return x + self.last(x)


@pytest.mark.parametrize("kind", [Decoder, DecoderInSteps, DecoderInPlace])
def test_an_addition_that_the_example_does_not_reach_is_warned_of_where_it_runs(kind):
    model, x, context = Through(kind), torch.randn(4, 6), torch.ones(4, 6)
    handle = sd.apply(model, example=x)
    warned = pytest.warns(
        sd.errors.BypassedAdditionWarning,
        match=f"{kind.__name__}.forward, line .* on a path that it does not take on the example",
    )
    with handle.forced([False] * 3):
        assert torch.equal(model(x), x)
        with warned:
            assert not torch.equal(model(x, context), x)
    with handle.forced([True] * 3):
        model(x, context)
    with warned:
        model.eval()(x, context)
    sd.remove(model)
    handle = sd.apply(model, example=(x, context))
    with handle.forced([False] * 3):
        assert torch.equal(model(x, context), x)


class Positions(Branching):
    """Its further additions run on the example, or add nothing that a module computes."""

    def __init__(self):
        super().__init__()
        self.position, self.noise = nn.Embedding(6, 6), nn.Dropout(0.5)

    def forward(self, x, bias=None):
        x = x + self.position(torch.arange(6)).mean(0)
        if bias is not None:
            x = x + torch.relu(bias)
        return x + self.f(x)


class AddsNoise(Positions):
    def forward(self, x, bias=None):
        if self.training:
            x = x + self.noise(torch.ones_like(x))
        return x + self.f(x)


class AddsNumber(Positions):
    def forward(self, x, bias=None):
        x = x + self.shift()
        return x + self.f(x)

    def shift(self):
        return 0.5


class AddsInside(Positions):
    """Adds in a function of its own, as layers do that hand it to a checkpoint."""

    def forward(self, x, bias=None):
        def feed_forward(x):
            x = x + self.position(torch.arange(6)).mean(0) * self.f(x)
            return torch.relu(x)

        x = x + self.f(x)
        return feed_forward(x)


@pytest.mark.parametrize("kind", [Positions, AddsNoise, AddsNumber, AddsInside])
def test_an_addition_that_is_no_branch_is_not_warned_of(kind):
    model, x = Through(kind), torch.randn(4, 6)
    # Recorded: as errors they would fail the proof, so that another mechanism is used.
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        handle = sd.apply(model, example=x)
        for training in (False, True):
            with handle.forced([False] * 3):
                model.train(training)(x, torch.ones(6))
    assert not warned


class Forces(Through):
    """Differentiates its energy in its forward method, as models of molecules do."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        energy = super().forward(x).square().sum(1)
        return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class HooksTensor(Through):
    """Registers a hook on a tensor in its forward method."""

    def forward(self, x):
        x = super().forward(x + self.blocks[0].f.bias)
        x.register_hook(lambda gradient: gradient.clamp(-1, 1))
        return x


@pytest.mark.parametrize("kind", [Forces, HooksTensor])
@pytest.mark.parametrize("gate", ["batch", "subset"])
def test_a_model_that_runs_only_with_gradients_is_made_skippable(kind, gate):
    model, x = kind(InIf), torch.randn(4, 6)
    assert sd.plan(model, x).complete
    handle = sd.apply(model, example=x, gate=gate)
    sd.verify(model, x, repeats=1)
    with handle.forced([False] * 3):
        closed = model(x)
    expected = (x.square().sum(1), -2 * x) if kind is Forces else x + model.blocks[0].f.bias
    torch.testing.assert_close(closed, expected)
