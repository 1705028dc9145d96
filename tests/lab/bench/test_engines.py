from dataclasses import replace

import pytest
import torch

from stochastic_depth.engine import library
from stochastic_depth.lab.bench.engines import DESIGNS, active_share, designs, engine_steps
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.train.runtime import Execution

pytestmark = pytest.mark.usefixtures("one_thread")
EXECUTION = Execution("cpu", "float32", 1)


def test_shares_are_spread_over_the_depth():
    assert [p == 1 for p in active_share(6, 0.5)] == [False, True] * 3
    assert sum(p == 1 for p in active_share(54, 0.75)) == 40


def test_every_design_takes_the_same_steps():
    names = {n: e for n, e in designs(EXECUTION)[0].items() if "compiled" not in n}
    losses = {}
    for name, share, step in engine_steps(14, Workload(4, 16, 3, EXECUTION), names):
        losses.setdefault(share, {})[name] = [step().item() for _ in range(3)]
    for of_share in losses.values():
        assert len(of_share) == 2
        first, second = of_share.values()
        assert first == pytest.approx(second, rel=1e-4)
    assert losses[1.0] != losses[0.5]


def test_what_a_machine_cannot_run_is_named(monkeypatch):
    there, absent = designs(EXECUTION)
    assert {*there, *absent} == {*DESIGNS}
    assert "float32" in absent["graphs, native kernels"]
    monkeypatch.setenv("PATH", "")
    assert "g++" in designs(EXECUTION)[1]["compiled blocks"]
    absent = designs(replace(EXECUTION, device="cuda", precision="bfloat16"))[1]
    assert absent == {"graphs, native kernels": "they are for a CPU"}
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    bfloat16 = replace(EXECUTION, precision="bfloat16")
    assert designs(bfloat16)[1]["graphs, native kernels"] == library.missing()
