import itertools
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet
from support.blocks import InPlace, X, network

IMAGES = torch.zeros(2, 3, 16, 16)


def flops(model, handle, pattern):
    """Of one training step under a pattern of gates."""
    with handle.forced(pattern), FlopCounterMode(display=False) as counter:
        model(IMAGES).sum().backward()
    return counter.get_total_flops()


def test_a_convolution_counts_two_per_multiply_add():
    model = CifarResNet(8)
    sd.apply(model)
    first = sd.summary(model, IMAGES).blocks[0]
    one_convolution = 2 * 2 * 16 * 16 * 16 * 16 * 9
    assert first.forward == 2 * one_convolution
    assert first.backward == 2 * first.forward
    assert first.parameters == 2 * 16 * 16 * 9 + 4 * 16
    assert (first.name, first.kind) == ("blocks.0", "Residual")


def test_the_expected_saving_is_the_mean_over_all_patterns_of_gates():
    model = CifarResNet(8)
    handle = sd.apply(model, sd.LinearDecay(0.3))
    full, mean = flops(model, handle, (True,) * 3), 0.0
    for pattern in itertools.product((False, True), repeat=3):
        weight = 1.0
        for p, is_open in zip(handle.survival, pattern, strict=True):
            weight *= p if is_open else 1 - p
        mean += weight * flops(model, handle, pattern)
    summary = sd.summary(model, IMAGES)
    assert summary.forward + summary.backward == full
    assert summary.expected_saving == pytest.approx(1 - mean / full, abs=1e-12)


def test_what_a_closed_block_has_inside_is_saved_once():
    def group():
        inner = (sd.Residual(nn.Conv2d(3, 3, 3, padding=1, bias=False)) for _ in range(2))
        return sd.Residual(nn.Sequential(*inner, nn.Conv2d(3, 3, 1, bias=False)))

    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), group(), group())
    handle = sd.apply(model, sd.Uniform(0.3))
    open_ = tuple(itertools.product((False, True), repeat=6))
    costs = {pattern: flops(model, handle, pattern) for pattern in open_}
    full = costs[(True,) * 6]
    summary = sd.summary(model, IMAGES)
    for pattern, cost in costs.items():
        assert summary.saving(pattern) == pytest.approx(1 - cost / full, abs=1e-12)
    mean = sum(math.prod(0.3 if b else 0.7 for b in p) * cost for p, cost in costs.items())
    assert summary.expected_saving == pytest.approx(1 - mean / full, abs=1e-12)


def test_linear_decay_saves_a_quarter_of_resnet_110():
    model = CifarResNet(110)
    sd.apply(model)
    summary = sd.summary(model, torch.zeros(1, 3, 32, 32))
    assert summary.expected_depth == pytest.approx(40.25)
    assert summary.expected_saving == pytest.approx(0.25, abs=0.01)


def test_blocks_of_other_models_are_counted_too():
    model = network(InPlace).float()
    sd.apply(model, sd.Uniform(0.5), example=X.float())
    summary = sd.summary(model, X.float())
    for block in summary.blocks:
        assert block.kind == "InPlace"
        assert block.forward == 2 * 2 * 5 * 6 * 6
        assert block.parameters == 2 * (6 * 6 + 6)


class Matrices(nn.Module):
    """A residual block with its matrices in one parameter, so that all print alike."""

    def __init__(self, matrices: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(matrices, 8, 8) / 8)

    def forward(self, x):
        return x + torch.linalg.multi_dot([x, *self.matrices])


def test_blocks_that_print_alike_are_counted_each():
    model, x = nn.Sequential(Matrices(1), Matrices(9)), torch.randn(4, 8)
    sd.apply(model, example=x)
    first, second = sd.summary(model, x).blocks
    assert first.forward == 2 * 4 * 8 * 8
    assert second.forward == 9 * first.forward


def test_a_frozen_network_has_no_backward_pass():
    model = CifarResNet(8).requires_grad_(False)
    sd.apply(model)
    summary = sd.summary(model, IMAGES)
    assert summary.backward == 0
    assert summary.forward > 0


def test_a_summary_changes_nothing():
    model = CifarResNet(8)
    handle = sd.apply(model)
    model(IMAGES).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(IMAGES)
    model.train()
    sd.summary(model, IMAGES)
    assert handle.step == 1
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.eval()(IMAGES), expected)


def test_it_prints_as_a_table():
    model = CifarResNet(8)
    sd.apply(model)
    lines = str(sd.summary(model, IMAGES)).splitlines()
    assert lines[0].split() == ["block", "class", "p", "parameters", "forward", "backward"]
    assert len(lines) == 7
    assert lines[5].startswith("with 3 blocks each is a large part of the network")
    assert lines[4].startswith("expected depth 2 of 3 blocks")
    assert max(map(len, lines)) <= 100


def test_a_model_without_stochastic_depth_is_refused():
    with pytest.raises(sd.errors.ApplyError, match="has no stochastic depth"):
        sd.summary(nn.Linear(2, 2), torch.zeros(1, 2))


def deep(blocks: int) -> nn.Sequential:
    return nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(blocks)))


@pytest.mark.parametrize(
    ("blocks", "options", "warned"),
    [
        (9, {"survival": sd.LinearDecay(0.5)}, True),
        (9, {"survival": sd.LinearDecay(0.8)}, False),
        (30, {"survival": sd.LinearDecay(0.5)}, False),
        (9, {"survival": sd.LinearDecay(0.5), "closed": "forward-only"}, False),
    ],
)
def test_a_network_that_is_too_shallow_for_its_rates_is_advised(blocks, options, warned):
    model = deep(blocks)
    sd.apply(model, **options)
    text = str(sd.summary(model, torch.randn(2, 4)))
    assert ("0.8 or more is advised" in " ".join(text.split())) == warned


def test_gating_and_schedule_are_told_where_they_are_not_the_papers():
    model = deep(3)
    sd.apply(model, balance=True, schedule=sd.Early(30))
    summary = sd.summary(model, torch.randn(2, 4))
    assert (
        summary.gating
        == "gates: balanced, one coin a batch; schedule: Early(until=30, shape=linear)"
    )
    assert summary.gating in str(summary)
    assert [b.survival for b in summary.blocks] == pytest.approx([5 / 6, 4 / 6, 3 / 6])
    sd.remove(model)
    sd.apply(model)
    assert sd.summary(model, torch.randn(2, 4)).gating == ""


def test_masks_for_single_samples_save_nothing():
    model = deep(3)
    sd.apply(model, sd.Uniform(0.5), gate="sample")
    summary = sd.summary(model, torch.randn(2, 4))
    assert summary.expected_saving == summary.saving([False] * 3) == 0
    assert "0.0 % saved gates: one coin a sample, whose branches run on all samples" in " ".join(
        str(summary).split()
    )


def test_a_rule_of_the_step_is_summed_up_as_it_is_now():
    model = deep(3)
    handle = sd.apply(model, lambda block, blocks, step: 1 - min(1, step / 100) * block / 6)
    handle.step = 1000
    assert sd.summary(model, torch.randn(2, 4)).expected_depth == pytest.approx(2)


class Ragged(nn.Module):
    """A branch with a product of nested tensors, of which no formula knows the FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        rows = torch.nested.as_nested_tensor([x[0], x[1, :2]])
        product = torch.nested.to_padded_tensor(torch.bmm(rows, rows.transpose(1, 2)), 0.0)
        return self.mix(x) * product.sum()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_could_not_be_counted_is_named():
    model = nn.Sequential(sd.Residual(Ragged()), sd.Residual(Ragged()))
    sd.apply(model)
    summary = sd.summary(model, torch.ones(2, 3, 4))
    assert summary.uncounted["bmm"] >= 2
    assert f"not counted: the FLOPs of bmm ({summary.uncounted['bmm']} calls)" in str(summary)
    plain = CifarResNet(8)
    sd.apply(plain)
    assert "not counted" not in str(sd.summary(plain, IMAGES))


class NormsTheSum(nn.Module):
    """Two additions, the second of a larger branch."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.up, self.down = (
            nn.Linear(8, 8, bias=False),
            nn.Linear(8, 32, bias=False),
            nn.Linear(32, 8, bias=False),
        )
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x):
        x = self.first(x + self.narrow(x))
        return self.second(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("granularity", ["unit", "block"])
def test_blocks_of_different_branches_and_one_whose_input_needs_no_gradient(granularity):
    model, x = nn.Sequential(*(NormsTheSum() for _ in range(3))), torch.randn(4, 8)
    sd.apply(model, example=x, granularity=granularity)
    small, large = 2 * 4 * 8 * 8, 2 * 2 * 4 * 8 * 32
    forward, backward = [small, large] * 3, [small, 2 * large, *[2 * small, 2 * large] * 2]
    if granularity == "block":
        forward = [sum(forward[n : n + 2]) for n in (0, 2, 4)]
        backward = [sum(backward[n : n + 2]) for n in (0, 2, 4)]
    summary = sd.summary(model, x)
    assert [block.forward for block in summary.blocks] == forward
    assert [block.backward for block in summary.blocks] == backward


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return x + self.cells(x)[0]


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool1d(3, 1, 1)

    def forward(self, x):
        return x + self.pool(x)


@pytest.mark.parametrize(("block", "named"), [(Recurrent, True), (Pooled, False)])
def test_blocks_without_countable_flops_print_and_recurrent_layers_are_named(block, named):
    model, x = nn.Sequential(block(), block()), torch.randn(2, 3, 4)
    sd.apply(model, example=x)
    summary = sd.summary(model, x)
    assert "0.0 % saved" in str(summary)
    assert any("rnn" in name for name in summary.uncounted) == named
