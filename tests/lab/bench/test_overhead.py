import timeit

import torch
from torch import nn

from stochastic_depth.lab.bench.overhead import ALTERNATIVES, closed_unit_seconds, overhead_steps
from stochastic_depth.lab.bench.workload import PlainResNet, Workload, copy_weights
from stochastic_depth.models import CifarResNet
from stochastic_depth.timing import Timing, paired_ratio, take_turns
from stochastic_depth.train.runtime import Runtime


def test_the_plain_network_computes_the_same():
    plain, model = PlainResNet(20).double(), CifarResNet(20, init="he").double()
    copy_weights(model, plain)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-12, atol=1e-12)


def test_both_take_the_same_training_steps():
    steps = overhead_steps(8, Workload(4, 8, 3, Runtime("cpu", "float32", 1)))
    losses = {name: [step().item() for _ in range(3)] for name, step in steps.items()}
    assert losses[ALTERNATIVES[0]] == losses[ALTERNATIVES[1]]


def test_a_closed_unit_costs_a_few_calls_of_a_module_that_returns_its_input(one_thread):
    x, units = torch.ones(2, 1), nn.Sequential(*(nn.Identity() for _ in range(100)))
    call = min(timeit.repeat(lambda: units(x), number=1, repeat=1000)) / len(units)
    assert 0 < closed_unit_seconds() < 25 * call  # about eight where nothing else runs


def test_alternatives_take_turns_in_alternating_order():
    called = []
    alternatives = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    rounds = list(take_turns(alternatives, repeats=2, warmup=1))
    assert "".join(called) in ("baabba", "abbaab")
    assert [set(seconds) for seconds in rounds] == [{"a", "b"}] * 2


def test_ratios_are_taken_round_by_round():
    rounds = [{"a": 2.0, "b": 1.0}, {"a": 30.0, "b": 10.0}, {"a": 4.0, "b": 4.0}]
    assert paired_ratio(rounds, "a", "b") == Timing((2.0, 3.0, 1.0))
    assert paired_ratio(rounds, "a", "b").median == 2.0
