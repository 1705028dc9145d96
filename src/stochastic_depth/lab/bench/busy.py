"""Training steps while another program keeps one core busy."""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console

from stochastic_depth.lab.bench.results import bench_table, milliseconds, with_progress
from stochastic_depth.lab.bench.workload import (
    Step,
    Workload,
)
from stochastic_depth.lab.options import BusyOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.survival import LinearDecay
from stochastic_depth.timing import Timing, take_turns
from stochastic_depth.train.runtime import Runtime

QUIET, BUSY = "quiet", "one core busy"


BOUND = 2.0
"""The most that a step with all threads and one busy core may take, relative to one with one
thread."""


def bench(options: BusyOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    """Time training steps with a free and with a busy core, and compare them."""
    workload = Workload(options.batch, options.size, 3, runtime)
    step = workload.engine_step(CifarResNet(options.depth), LinearDecay(0.5))
    every = torch.get_num_threads()
    threads = sorted({1, every})
    found: dict[str, dict[int, Timing]] = {}
    for situation in (QUIET, BUSY):
        with busy_core() if situation == BUSY else nullcontext():
            steps = {str(count): _with_threads(step, count) for count in threads}
            rounds = list(
                with_progress(
                    take_turns(steps, options.repeats, 1), options.repeats, console, situation
                )
            )
        torch.set_num_threads(every)
        found[situation] = {n: Timing(tuple(r[str(n)] for r in rounds)) for n in threads}
    title = f"A training step of ResNet-{options.depth}, batch {options.batch}, p_L = 0.5"
    table = bench_table(title, runtime, "", QUIET, BUSY)
    for count in threads:
        cells = (found[situation][count] for situation in (QUIET, BUSY))
        table.add_row(
            f"{count} thread{'s' * (count != 1)}, ms",
            *("{} ({}-{})".format(*map(milliseconds, (t.median, *t.quartiles))) for t in cells),
        )
    console.print(table)
    ratio = found[BUSY][every].median / found[BUSY][1].median
    spin = os.environ.get("GOMP_SPINCOUNT", "not set")
    console.print(
        f"with one core busy a step takes {ratio:.2f} times that of one thread (at most "
        f"{BOUND:g} is asked for); GOMP_SPINCOUNT is {spin}"
    )
    return {
        "clock": "perf_counter",
        "seconds": {
            situation: {str(n): list(timing.seconds) for n, timing in of_threads.items()}
            for situation, of_threads in found.items()
        },
        "busy_over_one_thread": ratio,
        "spin_count": spin,
        "cores": os.cpu_count(),
        "load": statistics.fmean(os.getloadavg()[:1]),
    }


def _with_threads(step: Step, count: int) -> Step:
    def run() -> torch.Tensor:
        torch.set_num_threads(count)
        return step()

    return run


@contextmanager
def busy_core() -> Iterator[None]:
    """While entered, another process computes without a pause."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()
