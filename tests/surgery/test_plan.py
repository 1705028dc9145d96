"""`sd.plan`: what would be done to a model, without doing it."""

import numpy as np
import pytest
import torch
from torch import nn

import stochastic_depth as sd
from support.blocks import WIDTH, Left, Projection, SideOutput, X, network

pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_block_with_its_mechanism_and_cost_and_the_model_is_left_as_it_was():
    model = network(Projection)
    types, before = [type(m) for m in model.modules()], model(X)
    plan = sd.plan(model, X, sd.Uniform(0.25))
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(X), before)
    sd.apply(model, example=X)
    costs = sd.summary(model, X)
    for block, cost in zip(plan.blocks, costs.blocks, strict=True):
        assert (block.name, block.kind, block.parameters) == (cost.name, cost.kind, cost.parameters)
        assert block.flops == cost.forward == 2 * 2 * len(X) * WIDTH * WIDTH
        assert (block.shortcut, block.mechanism, block.survival) == ("projection", "slice", 0.25)
    assert plan.complete
    assert "3 of 3 blocks skippable" in str(plan)


def test_a_block_that_cannot_be_skipped_is_named_with_the_reason():
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), SideOutput()).double()
    plan = sd.plan(model, X)
    assert [bool(block.refusal) for block in plan.blocks] == [False, True]
    assert not plan.complete
    assert "1 of 2 blocks skippable" in str(plan)
    assert "'2' (SideOutput): " in str(plan)
    with pytest.raises(sd.errors.UnsupportedBlockError, match=r"'2' \(SideOutput\)"):
        sd.apply(model, example=X)


def test_the_structure_alone_is_enough():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, WIDTH), Left(), Projection())
        plan = sd.plan(model, torch.randn(3, 4))
    assert [block.mechanism for block in plan.blocks] == ["slice", "slice"]


class Attention(nn.Module):
    """The attention of a ViT-S: 6 heads, 384 channels."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(384, 3 * 384), nn.Linear(384, 384)

    def forward(self, x):
        batch, tokens = x.shape[:2]
        q, k, v = self.qkv(x).view(batch, tokens, 3, 6, 64).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_flops_of_attention_are_those_of_its_products(device):
    with torch.device(device):
        model, x = nn.Sequential(Attention(), Attention()), torch.randn(2, 197, 384)
    projections = 4 * 2 * (2 * 197) * 384 * 384
    scores_and_mean = 2 * 2 * (2 * 6) * 197 * 197 * 64
    assert [b.flops for b in sd.plan(model, x).blocks] == 2 * [projections + scores_and_mean]
    if device == "cpu":
        sd.apply(model, example=x)
        assert sd.summary(model, x).blocks[0].forward == projections + scores_and_mean


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_survival_may_be_an_array_or_a_tensor(kind):
    p = [block.survival for block in sd.plan(network(Left), X, kind([0.875, 0.75, 0.5])).blocks]
    assert p == [0.875, 0.75, 0.5]


def test_an_unknown_granularity_is_an_error():
    with pytest.raises(sd.errors.ApplyError, match="granularity='units': choose one of"):
        sd.plan(network(Left), X, granularity="units")


class WritesAndReads(nn.Module):
    """Writes the output of one layer into a tensor, and reads the values of that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.read = (
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)) for _ in range(2)
        )

    def forward(self, x):
        for written, read in zip(self.written, self.read, strict=True):
            out = torch.zeros_like(x)
            out[0], out[1:] = written(x)[0], written(x)[1:]
            x = x + out
            y = read(x)
            x = x + (2 * y if y.sum().item() > 1e9 else y)
        return x


def test_each_block_has_its_reason_where_the_model_fails_with_all_of_them_closed():
    blocks = sd.plan(WritesAndReads(), torch.randn(3, WIDTH)).blocks
    reasons = {block.name: block.refusal for block in blocks}
    assert list(reasons) == ["written.0", "read.0", "written.1", "read.1"]
    for n in range(2):
        assert "written into another tensor in place" in reasons[f"written.{n}"]
        assert "of its branch must run even when the block is closed" in reasons[f"read.{n}"]


def test_an_applied_model_and_one_without_blocks_are_errors():
    model = network(Left)
    sd.apply(model, example=X)
    with pytest.raises(
        sd.errors.ApplyError, match=r"block '1' has stochastic depth already: sd\.remove"
    ):
        sd.plan(model, X)
    with pytest.raises(sd.errors.ApplyError, match="no residual block"):
        sd.plan(nn.Linear(4, 4), torch.randn(2, 4))
