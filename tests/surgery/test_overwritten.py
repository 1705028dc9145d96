"""Blocks whose sum is overwritten, in place, by what follows them.

A closed block gives its shortcut, which others hold too: what came before keeps it for its backward
pass, or the model uses it again.
"""

import itertools
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 4


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Layer(nn.Module):
    """A block, and what its caller does with the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Adds()

    def forward(self, x):
        x = self.block(x)
        x *= 1.5
        return x


class ByPosition(Layer):
    def forward(self, x):
        return F.hardswish(self.block(x), True)


class ThroughView(Layer):
    def forward(self, x):
        x = self.block(x)
        x.view(-1)[1:].mul_(1.5)
        return x


class InTheTrunk(Layer):
    """Adds in a loop, so that it is deferred."""

    def forward(self, x):
        for linear in [self.block.linear]:
            x = x + torch.tanh(linear(x))
        x *= 1.5
        return x


class Sourceless(Adds):
    made: ClassVar[dict] = {}
    exec("def forward(self, x): return x + torch.tanh(self.linear(x))", {"torch": torch}, made)
    forward = made["forward"]


class AroundSourceless(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.block = Sourceless()


WAYS = {
    Layer: "slice",
    ByPosition: "slice",
    ThroughView: "slice",
    AroundSourceless: "deferred",
    InTheTrunk: "deferred",
}


def _written_out(kind, x):
    """What follows the block, which changes nothing in place."""
    if kind is ByPosition:
        return F.hardswish(x)
    if kind is ThroughView:
        return torch.cat((x.flatten()[:1], 1.5 * x.flatten()[1:])).view_as(x)
    return 1.5 * x


def _gradients(outputs, parameters):
    total = torch.stack([out.sum() for out in outputs]).sum()
    return torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)


class Model(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        aside = self.head(x)  # keeps x for its backward pass
        for layer in self.layers:
            x = layer(x)
        return x, aside


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", WAYS)
def test_a_closed_block_gives_a_shortcut_that_may_be_overwritten(kind, training):
    torch.manual_seed(0)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    model = Model(kind).double()
    parameters = list(model.parameters())
    handle = sd.apply(model, sd.Uniform(1.0), example=x)
    assert [block.mechanism for block in applied_to(model).found] == [WAYS[kind]] * 3
    model.train(training)
    for gates in itertools.product((True, False), repeat=3):
        with handle.forced(list(gates)):
            found = model(x)
            gradients = _gradients(found, parameters)
        expected = model.embed(x)
        aside = model.head(expected)
        for layer, is_open in zip(model.layers, gates, strict=True):
            linear = layer.block.linear
            branch = torch.tanh(F.linear(expected, linear.weight, linear.bias))
            expected = _written_out(kind, expected + branch if is_open else expected)
        torch.testing.assert_close(found, (expected, aside))
        torch.testing.assert_close(gradients, _gradients((expected, aside), parameters))


class Later(nn.Module):
    """Overwrites its own sum, under a condition that the example does not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x + torch.tanh(self.linear(x))
        if len(y) > 3:
            y.mul_(0.5)
        return y


def test_a_sum_that_its_method_may_overwrite_is_a_copy_of_the_shortcut():
    stem, model = nn.Linear(WIDTH, WIDTH), nn.Sequential(Later(), Later())
    handle = sd.apply(model, sd.Uniform(0.5), example=torch.randn(3, WIDTH))
    x = stem(torch.randn(4, WIDTH))
    before = x.clone()
    with handle.forced([False, False]):
        assert torch.equal(model(x), before / 4)
    assert torch.equal(x, before)
