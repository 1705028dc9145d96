"""Training steps while another program keeps one core busy."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stochastic_depth.lab.bench.results import bench_table, milliseconds, time_in_turns
from stochastic_depth.lab.bench.workload import Step, Workload
from stochastic_depth.lab.options import BusyOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.survival import LinearDecay
from stochastic_depth.timing import Timing
from stochastic_depth.train.runtime import Runtime

QUIET, BUSY = "quiet", "one core busy"
BOUND = 2.0
"""The most that a step with all threads and one busy core may take, relative to one with one
thread."""


@dataclass(frozen=True)
class BusyResult:
    """The timing of a step, by situation and number of threads."""

    timings: Mapping[str, Mapping[int, Timing]]
    clock: str

    @property
    def busy_over_one_thread(self) -> float:
        """The time with all threads and one busy core, over that with one thread."""
        of_threads = self.timings[BUSY]
        return of_threads[max(of_threads)].median / of_threads[1].median

    def to_json(self) -> dict[str, Any]:
        return {
            "clock": self.clock,
            "seconds": {
                situation: {str(n): list(timing.seconds) for n, timing in of_threads.items()}
                for situation, of_threads in self.timings.items()
            },
            "busy_over_one_thread": self.busy_over_one_thread,
            "spin_count": spin_count(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        }


def spin_count() -> str:
    """How often OpenMP threads that wait look again before they release their core."""
    return os.environ.get("GOMP_SPINCOUNT", "not set")


def measure(options: BusyOptions, runtime: Runtime, console: Console) -> BusyResult:
    """Time training steps with a free and with a busy core."""
    workload = Workload(options.batch, options.size, 3, runtime)
    step = workload.engine_step(CifarResNet(options.depth), LinearDecay(0.5))
    every = torch.get_num_threads()
    steps = {str(count): _with_threads(step, count) for count in sorted({1, every})}
    found: dict[str, dict[int, Timing]] = {}
    clock = ""
    for situation in (QUIET, BUSY):
        with busy_core() if situation == BUSY else nullcontext():
            timed = time_in_turns(steps, options.repeats, console, warmup=1, doing=situation)
        torch.set_num_threads(every)
        found[situation] = {int(count): timing for count, timing in timed.timings.items()}
        clock = timed.clock
    return BusyResult(found, clock)


def tables(result: BusyResult, options: BusyOptions, runtime: Runtime) -> Iterator[Table | str]:
    title = f"A training step of ResNet-{options.depth}, batch {options.batch}, p_L = 0.5"
    table = bench_table(title, runtime, "", QUIET, BUSY)
    for count in result.timings[QUIET]:
        cells = (result.timings[situation][count] for situation in (QUIET, BUSY))
        table.add_row(
            f"{count} thread{'s' * (count != 1)}, ms",
            *("{} ({}-{})".format(*map(milliseconds, (t.median, *t.quartiles))) for t in cells),
        )
    yield table
    yield (
        f"with one core busy a step takes {result.busy_over_one_thread:.2f} times that of one "
        f"thread (at most {BOUND:g} is asked for); GOMP_SPINCOUNT is {spin_count()}"
    )


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
