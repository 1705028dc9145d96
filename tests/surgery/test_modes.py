"""Blocks that add in another expression in training mode than in evaluation."""

import itertools

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
