"""Residual blocks that a model runs in training mode alone, such as those of an auxiliary head."""

import itertools

import pytest
import torch
from torch import nn

import stochastic_depth as sd

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(6, 6)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.auxiliary = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.BatchNorm1d(6)


class Head(Base):
    """After the others, and by modules whose class adds in evaluation too."""

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        y = x
        for block in self.auxiliary if self.training else ():
            y = block(y)
        return x, self.norm(y)


class First(Base):
    """Before the others: an augmentation that is learnt."""

    def forward(self, x):
        y = x
        for block in self.auxiliary if self.training else ():
            x = block(x)
        for block in self.blocks:
            x = block(x)
        return x, self.norm(y)


class TrunkFirst(First):
    """Before the others, in a loop that both modes share."""

    def forward(self, x):
        y = x
        if self.training:
            x = self.run(self.auxiliary, x)
        return self.run(self.blocks, x), self.norm(y)

    def run(self, blocks, x):
        for block in blocks:
            x = x + torch.tanh(block.f(x))
        return x


class Trunk(Base):
    """Added by the model itself, in a loop that both modes share."""

    def forward(self, x):
        x = self.run(self.blocks, x)
        y = x
        if self.training:
            y = self.run(self.auxiliary, y)
        return x, self.norm(y)

    def run(self, blocks, x):
        for block in blocks:
            x = x + torch.tanh(block.f(x))
        return x


def norm(y):
    y = y - y.mean(0)
    return y / (y.pow(2).mean(0) + 1e-5).sqrt()


def by_hand(model, gates, x):
    """In training mode; the gates in the order in which the blocks run."""
    blocks = [*model.blocks, *model.auxiliary]
    if isinstance(model, First):
        blocks = [*model.auxiliary, *model.blocks]
    values = [x]
    for block, gate in zip(blocks, gates, strict=True):
        x = x + gate * torch.tanh(x @ block.f.weight.T + block.f.bias)
        values.append(x)
    return (values[4], norm(values[0])) if isinstance(model, First) else (values[2], norm(x))


def gradients(outputs, model):
    total = sum((output * n).pow(3).sum() for n, output in enumerate(outputs, 1))
    parameters = [p for name, p in model.named_parameters() if "norm" not in name]
    return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("kind", [Head, First, Trunk, TrunkFirst])
def test_every_pattern_of_gates_is_the_sum_written_out(kind):
    torch.manual_seed(0)
    model = kind().double()
    handle = sd.apply(model, sd.Uniform(0.7), example=X)
    names = ["blocks.0", "blocks.1", "auxiliary.0", "auxiliary.1"]
    names = names[2:] + names[:2] if issubclass(kind, First) else names
    assert [block.name for block in handle.blocks] == names
    for gates in itertools.product([False, True], repeat=4):
        expected = by_hand(model, gates, X)
        with handle.forced(list(gates)):
            outputs = model.train()(X)
        for output, truth in zip(outputs, expected, strict=True):
            assert torch.allclose(output, truth, rtol=0, atol=1e-12)
        pairs = zip(gradients(outputs, model), gradients(expected, model), strict=True)
        assert all(torch.allclose(ours, truth, atol=1e-10) for ours, truth in pairs)
    x = X
    for block in model.blocks:
        x = x + 0.7 * torch.tanh(x @ block.f.weight.T + block.f.bias)
    assert torch.allclose(model.eval()(X)[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Head, Trunk])
def test_the_plan_and_the_summary_know_them(kind):
    model = kind().double()
    plan = sd.plan(model, X)
    assert [block.training_only for block in plan.blocks] == [False, False, True, True]
    assert "in training mode only: 'auxiliary.0', 'auxiliary.1'" in str(plan)
    sd.apply(model, example=X)
    flops = {block.forward for block in sd.summary(model, X).blocks}
    assert flops == {4 * 2 * 6 * 6}


def test_looking_in_training_mode_leaves_no_trace():
    model = Head().double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    random = torch.get_rng_state()
    sd.plan(model, X)
    sd.apply(model, example=X)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_addition_of_training_mode_that_is_none_is_listed():
    class Listed(Head):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            if self.training:
                first, second = self.auxiliary
                return x, self.norm(first.f(x) + second.f(x))
            return x, self.norm(x)

    plan = sd.plan(Listed().double(), X)
    assert len(plan.blocks) == 2
    (rejected,) = plan.rejected
    assert "Listed.forward" in rejected
    assert "parallel branches" in rejected


def test_one_that_cannot_be_closed_is_refused_and_the_remedy_works():
    class Needed(Head):
        """What its branch computes goes out too."""

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            if not self.training:
                return x, self.norm(x)
            inner = self.auxiliary[0].f(x)
            return x, self.norm(x + inner), inner

    model = Needed().double()
    with pytest.raises(sd.errors.UnsupportedBlockError, match="is needed for more than") as caught:
        sd.apply(model, example=X)
    assert "include=['blocks']" in str(caught.value)
    handle = sd.apply(model, example=X, include=["blocks"])
    assert [block.name for block in handle.blocks] == ["blocks.0", "blocks.1"]


def test_a_module_that_training_mode_calls_more_often_is_refused_with_the_numbers():
    class Twice(Base):
        def forward(self, x):
            for _ in range(2 if self.training else 1):
                for block in self.blocks:
                    x = x + torch.tanh(block.f(x))
            return x

    with pytest.raises(
        sd.errors.UnsupportedBlockError, match="called 2 times in training mode and 1 in"
    ):
        sd.apply(Twice().double(), example=X)


def test_what_training_mode_needs_of_a_branch_is_the_reason():
    class Regularised(Base):
        """In training mode the sizes of the branches are a part of the loss."""

        def forward(self, x):
            total = 0
            for block in self.blocks:
                y = torch.tanh(block.f(x))
                total = total + y.pow(2).mean() if self.training else total
                x = x + y
            return x, total

    with pytest.raises(
        sd.errors.UnsupportedBlockError, match=r"in training mode 'blocks\.0\.f' of its"
    ):
        sd.apply(Regularised().double(), example=X)


@pytest.mark.parametrize("kind", [Head, First, Trunk])
def test_their_samples_are_drawn_and_they_are_verified(kind):
    model = kind().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X, gate="subset")
    gates = handle.gates_at(0, len(X))
    for output, truth in zip(
        model.train()(X), by_hand(model, gates.double()[:, :, None], X), strict=True
    ):
        assert torch.allclose(output, truth, rtol=0, atol=1e-12)
    assert sd.verify(model, X, repeats=1).blocks == 4


class Normalised(nn.Module):
    """Gives what it adds, and its normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x):
        normed = self.norm(x)
        return torch.tanh(self.f(normed)), normed


class Decorrelated(nn.Module):
    """In training mode the normalised inputs have a loss of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Normalised() for _ in range(3))

    def forward(self, x):
        inputs = []
        for layer in self.layers:
            y, normed = layer(x)
            inputs.append(normed)
            x = y + x
        return x, torch.stack(inputs).pow(4).mean() if self.training else 0


def test_what_training_mode_needs_of_a_layer_runs_and_the_rest_of_it_is_skipped():
    torch.manual_seed(0)
    model = Decorrelated().double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    assert len(handle.blocks) == 3
    called = []
    for layer in model.layers:
        layer.f.register_forward_hook(lambda module, *_: called.append(module))
    for pattern in itertools.product([False, True], repeat=3):
        called.clear()
        with handle.forced(list(pattern)):
            output, loss = model.train()(X)
        x, inputs = X, []
        for layer, gate in zip(model.layers, pattern, strict=True):
            normed = torch.nn.functional.layer_norm(x, (6,))
            inputs.append(normed)
            x = x + gate * torch.tanh(normed @ layer.f.weight.T + layer.f.bias)
        assert torch.allclose(output, x, rtol=0, atol=1e-12)
        assert torch.allclose(loss, torch.stack(inputs).pow(4).mean(), rtol=0, atol=1e-12)
        assert len(called) == sum(pattern)
