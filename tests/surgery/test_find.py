"""Which additions make a block, what it is called, and which blocks are left as they are."""

import itertools

import pytest
import torch
from torch import nn

import stochastic_depth as sd

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
