import pytest

from stochastic_depth.lab.bench.skip import CONSTANT, Skip, skippings
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")

WORKLOAD = Workload(4, 16, 3, Runtime("cpu", "float32", 1))


def test_flops_and_memory_are_those_of_the_blocks_that_ran():
    bench = Skip(20, WORKLOAD)
    results = skippings(list(bench.rounds(2)))
    assert results[CONSTANT].relative == (1.0, 1.0)
    assert results[CONSTANT].active == pytest.approx((1.0, 1.0))
    assert results[CONSTANT].efficiencies == []
    quarter, half = results["25 % of blocks"], results["50 % of blocks"]
    assert 0 < quarter.active[0] < half.active[0] < 1
    kept, active = bench.memory("50 % of blocks", 1)
    assert active == pytest.approx(4 / 9)
    assert active < kept < 1
    assert bench.memory(CONSTANT, 1) == (1, 1)


def test_efficiency_is_time_saved_over_flops_saved():
    rounds = [{CONSTANT: (2.0, 1.0), "a": (1.0, 0.5)}, {CONSTANT: (2.0, 1.0), "a": (1.2, 0.5)}]
    assert skippings(rounds)["a"].efficiencies == pytest.approx([1.0, 0.8])
