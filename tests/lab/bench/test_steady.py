import pytest
import torch

from stochastic_depth.lab.bench.steady import (
    BALANCED,
    CONSTANT,
    INDEPENDENT,
    Steady,
    steadiness,
)
from stochastic_depth.lab.bench.workload import Workload, saved_for_backward
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bytes_kept_are_those_of_the_steps_and_balanced_ones_are_even():
    bench = Steady("cifar-resnet", 32, 0.3, Workload(2, 8, 3, Runtime("cpu", "float32", 1)))
    found = steadiness(list(bench.rounds(12)))
    assert set(found) == {CONSTANT, INDEPENDENT, BALANCED}
    assert len(set(found[CONSTANT].kept)) == 1
    for name in (INDEPENDENT, BALANCED):
        kept = saved_for_backward(bench._steps[name])
        assert bench.kept(bench._handles[name]) == pytest.approx(kept, rel=0.02)
    even, uneven = found[BALANCED], found[INDEPENDENT]
    assert even.peak_over_mean < uneven.peak_over_mean
    counts = [int(bench._handles[BALANCED].gates_at(step).sum()) for step in range(14)]
    assert max(counts) - min(counts) <= 1
    assert even.largest_batch(2, 2**20) >= uneven.largest_batch(2, 2**20)
    assert torch.tensor(even.seconds).min() > 0


def test_the_alternatives_take_turns_in_an_order_that_is_reversed():
    bench = Steady("cifar-resnet", 8, 0.5, Workload(2, 8, 3, Runtime("cpu", "float32", 1)))
    called, steps = [], bench._steps
    bench._steps = {n: lambda n=n: called.append(n) or steps[n]() for n in steps}
    assert len(list(bench.rounds(2, warmup=0))) == 2
    assert called[3:] == called[2::-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the peak of its allocator")
def test_on_a_gpu_the_bytes_of_a_step_are_the_peak_of_the_allocator():
    bench = Steady("cifar-resnet", 32, 0.3, Workload(32, 32, 3, Runtime("cuda", "float32", 1)))
    found = steadiness(list(bench.rounds(6)))
    kept = saved_for_backward(bench._steps[CONSTANT])
    assert kept < max(found[CONSTANT].kept) < 3 * kept
    assert max(found[BALANCED].kept) < max(found[CONSTANT].kept)
