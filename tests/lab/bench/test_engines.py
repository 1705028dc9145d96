from dataclasses import replace

import pytest

from stochastic_depth.block_program.library import why_unavailable
from stochastic_depth.lab.bench.engines import DESIGNS, designs, engine_steps
from stochastic_depth.lab.bench.workload import Workload, active_share
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")
EXECUTION = Runtime("cpu", "float32", 1)


def test_shares_are_spread_over_the_depth():
    assert active_share(6, 0.5) == [False, True] * 3
    assert sum(active_share(54, 0.75)) == 40
    assert all(active_share(54, 1.0))


def test_every_design_takes_the_same_steps():
    names = {n: e for n, e in designs(EXECUTION)[0].items() if "compiled" not in n}
    losses = {}
    for name, share, step in engine_steps(14, Workload(4, 16, 3, EXECUTION), names):
        losses.setdefault(share, {})[name] = [step().item() for _ in range(3)]
    for of_share in losses.values():
        assert len(of_share) == 3 - bool(why_unavailable())
        first, *others = of_share.values()
        for other in others:
            assert other == pytest.approx(first, rel=1e-4)
    assert losses[1.0] != losses[0.5]


def test_what_a_machine_cannot_run_is_named(monkeypatch):
    there, absent = designs(EXECUTION)
    assert {*there, *absent} == {*DESIGNS}
    monkeypatch.setenv("PATH", "")
    assert "g++" in designs(EXECUTION)[1]["compiled blocks"]
    absent = designs(replace(EXECUTION, device="cuda", precision="bfloat16"))[1]
    assert absent == {"program, native kernels": "they are for a CPU"}
    assert "C++ compiler" in designs(EXECUTION)[1]["program, native kernels"]
