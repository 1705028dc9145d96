"""Which additions make a block, what it is called, and which blocks are left as they are."""

import contextlib
import cProfile
import itertools
import pstats

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.surgery.find.find_blocks import find_blocks
from stochastic_depth.surgery.select_modules import select_modules

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Within(nn.Module):
    """A residual addition inside of the branch of another."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.inner = nn.Linear(6, 6), nn.Linear(6, 6)

    def branch(self, x):
        h = self.outer(x)
        return h + torch.tanh(self.inner(h))

    def forward(self, x):
        return x + self.branch(x)


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_an_addition_in_the_branch_of_another_is_scaled_once(scale) -> None:
    model = nn.Sequential(Within(), Within()).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X, scale=scale)
    for pattern in itertools.product((False, True), repeat=2):
        expected = X
        for is_open, block in zip(pattern, model, strict=True):
            if is_open:
                factor = 2.0 if scale == "training" else 1.0
                expected = expected + factor * block.branch(expected)
        with handle.forced(pattern):
            torch.testing.assert_close(model.train()(X), expected, rtol=1e-12, atol=1e-12)
    expected = X
    for block in model:
        expected = expected + (0.5 if scale == "inference" else 1.0) * block.branch(expected)
    torch.testing.assert_close(model.eval()(X), expected, rtol=1e-12, atol=1e-12)


class Lists(nn.Module):
    """A trunk that takes its layers from several lists, and shares a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.dropout(layer(norm(x)))
        return x


def test_blocks_of_a_trunk_are_called_as_the_largest_module_that_is_theirs_alone() -> None:
    handle = sd.apply(Lists().double(), example=X)
    assert [block.name for block in handle.blocks] == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize("left", ["layers.1", "norms.1"])
def test_a_block_with_an_excluded_module_in_its_branch_stays_as_it_is(left) -> None:
    model = Lists().double()
    handle = sd.apply(model, example=X, exclude=[left])
    assert [block.name for block in handle.blocks] == ["layers.0", "layers.2"]
    with handle.forced([False, False]):
        expected = X + model.layers[1](model.norms[1](X))
        torch.testing.assert_close(model.train()(X), expected, rtol=1e-12, atol=1e-12)


def test_a_unit_with_an_excluded_module_stays_as_it_is() -> None:
    units = [sd.Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(3)]
    handle = sd.apply(nn.Sequential(*units).double(), exclude=["1.branch.0"])
    assert [block.name for block in handle.blocks] == ["0", "2"]


class WrittenOut(nn.Module):
    """A trunk without a loop, which calls one of its layers twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + torch.tanh(self.first(x))
        x = x + torch.tanh(self.second(x))
        return x + torch.sin(self.first(x))


def test_additions_that_a_model_writes_out_itself_are_a_block_each() -> None:
    model = WrittenOut().double()
    handle = sd.apply(model, example=X)
    assert [block.name for block in handle.blocks] == ["first", "second", "first"]
    branches = (
        lambda x: torch.tanh(model.first(x)),
        lambda x: torch.tanh(model.second(x)),
        lambda x: torch.sin(model.first(x)),
    )
    for pattern in itertools.product((False, True), repeat=3):
        expected = X
        for is_open, branch in zip(pattern, branches, strict=True):
            expected = expected + branch(expected) if is_open else expected
        with handle.forced(pattern):
            torch.testing.assert_close(model.train()(X), expected, rtol=1e-12, atol=1e-12)


class ParallelBranches(nn.Module):
    """As in GPS: two branches of one input, each added to it, are summed."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(6, 6)
        self.other = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x):
        return (x + self.proj(x)) + (x + self.other(x))


def test_a_sum_of_two_residual_sums_is_no_projected_shortcut() -> None:
    model = nn.Sequential(*(ParallelBranches() for _ in range(2))).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    with handle.forced([False, False]):
        torch.testing.assert_close(model.train()(X), 4 * X, rtol=1e-12, atol=1e-12)
    expected = X
    for block in model:
        expected = 2 * expected + 0.5 * (block.proj(expected) + block.other(expected))
    torch.testing.assert_close(model.eval()(X), expected, rtol=1e-12, atol=1e-12)


class Heads(nn.Module):
    """Several networks begin with the same value, and are of one class."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 6)

        def forward(self, x):
            return x + self.proj(x)

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x):
        x = x.tanh()
        return torch.cat([head(x) for head in self.heads], dim=-1)


def test_networks_that_begin_with_the_same_value_all_have_blocks() -> None:
    model = Heads().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    with handle.forced([False, True, False]):
        open_one = X.tanh() + model.heads[1].proj(X.tanh())
        expected = torch.cat([X.tanh(), open_one, X.tanh()], dim=-1)
        torch.testing.assert_close(model.train()(X), expected, rtol=1e-12, atol=1e-12)


class Pair(nn.Module):
    """Two additions in a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + torch.tanh(self.one(x))
        return x + torch.tanh(self.two(x))


class Siamese(nn.Module):
    """Encodes two inputs with the same layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Pair() for _ in range(3)))

    def encode(self, x):
        return self.layers(x)

    def forward(self, a, b):
        return self.encode(a), self.encode(b)


class SiameseTrunk(Siamese):
    """Adds itself, once for each input."""

    def encode(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer.one(x))
            x = x + torch.tanh(layer.two(x))
        return x


class SiameseHidden(Siamese):
    """Adds in a function without a place in a method of the layer."""

    def encode(self, x):
        for layer in self.layers:
            x = hidden(layer, x)
        return x


def hidden(layer, x):
    x = x + torch.tanh(layer.one(x))
    return x + torch.tanh(layer.two(x))


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("granularity", ["block", "unit"])
@pytest.mark.parametrize("kind", [Siamese, SiameseTrunk, SiameseHidden])
def test_layers_that_encode_two_inputs_have_one_gate_for_both(kind, granularity, gate) -> None:
    torch.manual_seed(0)
    model, other = kind().double(), X.flip(0) + 1
    handle = sd.apply(model, example=(X, other), granularity=granularity, gate=gate)
    blocks = 3 if granularity == "block" else 6
    assert handle.survival == pytest.approx([1 - n / blocks / 2 for n in range(1, blocks + 1)])
    for pattern in itertools.product((False, True), repeat=blocks):
        each = pattern if granularity == "unit" else [g for g in pattern for _ in range(2)]
        with handle.forced(pattern):
            outputs = model.train()(X, other)
        for given, output in zip((X, other), outputs, strict=True):
            expected = given
            for is_open, branch in zip(each, branches_of(model), strict=True):
                expected = expected + is_open * torch.tanh(branch(expected))
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    one, two = model.eval()(X, X)
    assert torch.equal(one, two)


def branches_of(model):
    return [branch for layer in model.layers for branch in (layer.one, layer.two)]


def test_a_layer_that_is_applied_again_to_what_it_gave_has_a_gate_each_time() -> None:
    class Tied(Siamese):
        def encode(self, x):
            return self.layers(self.layers(x))

    model = Tied().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=(X, X + 1))
    assert len(handle.blocks) == 6
    for pattern in itertools.product((False, True), repeat=6):
        with handle.forced(pattern):
            outputs = model.train()(X, X + 1)
        for given, output in zip((X, X + 1), outputs, strict=True):
            expected = given
            for is_open, layer in zip(pattern, [*model.layers, *model.layers], strict=True):
                expected = layer(expected) if is_open else expected
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


class KeepsItsBranch(nn.Module):
    """A block that is deferred, because it keeps what its branch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.last = nn.Linear(6, 6), None

    def forward(self, x):
        self.last = (y := self.f(x)).detach()
        return x + y.tanh()


class AppliedAgain(nn.Module):
    def __init__(self, times) -> None:
        super().__init__()
        self.times = times
        self.layers = nn.ModuleList([KeepsItsBranch(), KeepsItsBranch()])

    def forward(self, x):
        for _ in range(self.times):
            x = self.layers[0](x)
        return self.layers[1](x)


@pytest.mark.timeout(60)
def test_a_layer_that_is_applied_many_times_is_a_block_each_time_and_soon_found():
    assert len(sd.plan(AppliedAgain(60), torch.randn(4, 6)).blocks) == 61


class TwiceALayer(nn.Module):
    """A trunk that makes both additions of each of its layers itself."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList((nn.Linear(6, 6), nn.Linear(6, 6))) for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            first, second = layer.children()
            x = x + torch.tanh(first(x))
            x = x + torch.tanh(second(x))
        return x


def calls_to_find(layers: int) -> int:
    """How many functions are called to find the blocks of a trunk."""
    profile = cProfile.Profile()
    model = TwiceALayer(layers).double()
    selected = select_modules(model, None, None)
    found = profile.runcall(
        find_blocks, model, X, "block", selected, defer=set[str](), count_flops=False
    )
    assert [block.name for block in found.blocks] == [f"layers.{n}" for n in range(layers)]
    return pstats.Stats(profile).total_calls


def test_four_times_the_layers_are_about_four_times_the_work() -> None:
    calls_to_find(2)  # loads what is loaded once
    assert calls_to_find(32) < 5 * calls_to_find(8)


class Attempts(nn.Module):
    """Does without a module that cannot run on its input."""

    class Wide(nn.Module):
        def forward(self, *inputs):
            raise ValueError("it has too few features")

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.layer = self.Wide(), nn.Linear(6, 6)

    def forward(self, x):
        with contextlib.suppress(ValueError):
            x = self.wide(x)
        return x + torch.tanh(self.layer(x))


@pytest.mark.parametrize("in_hook", [False, True])
def test_after_an_exception_that_is_caught_an_addition_is_its_callers(in_hook) -> None:
    model = nn.Sequential(Attempts(), Attempts()).double()
    if in_hook:
        for block in model:
            block.wide.register_forward_pre_hook(block.wide.forward)
    plan = sd.plan(model, X)
    assert [block.mechanism for block in plan.blocks] == ["slice", "slice"]


class IntoItsBranch(nn.Module):
    """Adds its input in place to a branch that is a different view of all that a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x.T).T
        y += x
        return y


def test_a_view_that_is_overwritten_as_a_whole_leaves_nothing_of_what_was_there() -> None:
    model = nn.Sequential(IntoItsBranch(), IntoItsBranch()).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    for pattern in itertools.product((False, True), repeat=2):
        expected = X
        for is_open, block in zip(pattern, model, strict=True):
            expected = expected + block.layer(expected.T).T if is_open else expected
        with handle.forced(pattern):
            torch.testing.assert_close(model.train()(X), expected, rtol=1e-12, atol=1e-12)
