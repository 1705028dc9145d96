import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from stochastic_depth.block_program.library import why_unavailable
from stochastic_depth.lab.bench.engines import (
    DESIGNS,
    EnginesResult,
    MachinePeak,
    designs,
    engine_steps,
    machine_peak,
    tables,
)
from stochastic_depth.lab.bench.results import Rounds
from stochastic_depth.lab.bench.workload import PlainResNet, Workload, active_share
from stochastic_depth.lab.options import EnginesOptions
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")
EXECUTION = Runtime("cpu", "float32", 1)
needs_a_compiler = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


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


def test_a_share_of_the_peak_is_the_time_at_the_peak_over_that_of_a_step():
    timed = Rounds([{f"eager {share} %": 2.0 for share in (100, 75, 50)}] * 2, "perf_counter")
    peak = MachinePeak(flops_per_second=1e9, flops_per_step=500_000_000)
    result = EnginesResult(timed, {"eager": EXECUTION}, {}, peak)
    assert result.to_json()["peak"]["of_the_peak"] == {"eager": 0.25}
    console = Console(record=True, width=200)
    console.print(*tables(result, EnginesOptions(), EXECUTION))
    row = next(r for r in console.export_text().splitlines() if "at the machine's peak" in r)
    assert "500.0" in row
    assert replace(result, peak=None).to_json()["peak"] is None


def test_where_the_peak_cannot_be_measured_there_is_no_row(monkeypatch):
    step = Workload(2, 16, 3, EXECUTION).step(PlainResNet(8))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine_peak(EXECUTION, step) is None


@needs_a_compiler
def test_a_product_of_matrices_is_below_the_peak():
    a = torch.randn(256, 256)
    machine = machine_peak(EXECUTION, lambda: a @ a)
    assert machine is not None
    assert machine.flops_per_step == 2 * 256**3

    def seconds():
        began = time.thread_time()
        a @ a
        return time.thread_time() - began

    fastest = min(seconds() for _ in range(200))
    assert 0.1 < machine.seconds / fastest < 1.1  # of a peak that was measured a moment before
