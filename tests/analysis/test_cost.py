import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stochastic_depth.analysis import training_cost
from stochastic_depth.gates import BlockGates, Gate
from stochastic_depth.models import CifarResNet, DenseNet
from stochastic_depth.residual import Residual
from stochastic_depth.survival import LinearDecay


def flops(model, gates):
    """Of one training step with the blocks closed by hand."""
    units = [m for m in model.modules() if isinstance(m, Residual)]
    for unit, is_open in zip(units, gates, strict=True):
        unit.gates = BlockGates(training=Gate(is_open))
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, 16, 16)).sum().backward()
    return counter.get_total_flops()


def test_branch_costs_are_what_closing_them_saves():
    model = CifarResNet(20)
    cost = training_cost(CifarResNet(20), torch.zeros(2, 3, 16, 16))
    assert cost.total == flops(model, [True] * 9)
    for block in range(9):
        gates = [index != block for index in range(9)]
        assert cost.total - flops(model, gates) == cost.branches[block]


def test_a_convolution_counts_two_per_multiply_add_in_each_of_three_passes():
    cost = training_cost(CifarResNet(8), torch.zeros(2, 3, 16, 16))
    one_convolution = 2 * 2 * 16 * 16 * 16 * 16 * 9
    assert cost.branches[0] == 2 * 3 * one_convolution


def test_the_expected_saving_is_the_mean_over_gate_patterns():
    cost = training_cost(CifarResNet(8), torch.zeros(2, 3, 16, 16))
    survival = (0.9, 0.6, 0.3)
    mean = 0.0
    for pattern in range(8):
        gates = [bool(pattern >> i & 1) for i in range(3)]
        weight = 1.0
        for p, is_open in zip(survival, gates, strict=True):
            weight *= p if is_open else 1 - p
        mean += weight * flops(CifarResNet(8), gates)
    assert cost.expected_saving(survival) == pytest.approx(1 - mean / cost.total, abs=1e-12)


def test_linear_decay_saves_a_quarter_of_resnet_110():
    cost = training_cost(CifarResNet(110), torch.zeros(1, 3, 32, 32))
    survival = tuple(LinearDecay(0.5)(block, 54) for block in range(1, 55))
    assert cost.expected_saving(survival) == pytest.approx(0.25, abs=0.01)


def test_a_network_without_units_has_no_branches():
    assert training_cost(DenseNet(10, 12, classes=10), torch.zeros(1, 3, 32, 32)).branches == ()
