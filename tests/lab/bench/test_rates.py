import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.lab.bench.rates import RATES, measure_rates

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

    def forward(self, x):
        return x + self.f(x)


def measured(trained):
    """What rates save on eight blocks alike; and the handle."""
    model, x = nn.Sequential(*(Block() for _ in range(8))), torch.randn(64, 64)
    model.requires_grad_(trained)
    handle = sd.apply(model, sd.LinearDecay(0.5), example=x)
    seconds, savings = measure_rates(model, x, sd.summary(model, x), repeats=2)
    assert seconds > 0
    assert [saving.rate for saving in savings] == list(RATES)
    return savings, handle


def test_memory_is_saved_as_flops_are_where_all_blocks_keep_the_same():
    savings, handle = measured(trained=True)
    for saving in savings:  # linear decay closes (1 + 1 / 8) / 2 of the rate
        assert saving.flops == pytest.approx(saving.rate * 9 / 16, rel=0.1)
        assert saving.memory == pytest.approx(saving.flops, rel=0.1)
    assert handle.step == 0  # no gates were drawn from those of the training


def test_a_model_without_trained_parameters_keeps_nothing_and_saves_none_of_it():
    savings, _ = measured(trained=False)
    for saving in savings:
        assert saving.flops > 0
        assert saving.memory == 0
