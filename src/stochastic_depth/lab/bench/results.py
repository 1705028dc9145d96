"""The frame of every benchmark: it measures, has a result, and shows the result in tables.

The module of a benchmark has two functions: `measure(options, runtime, console)` returns its
`Result`, and `tables(result, options, runtime)` yields the tables and sentences to print.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import track
from rich.table import Table

from stochastic_depth.files import write_output
from stochastic_depth.lab.options import BenchOptions
from stochastic_depth.plain_text import count_text
from stochastic_depth.timing import Timing, take_turns
from stochastic_depth.train.runtime import Runtime, machine, versions

T = TypeVar("T")

MEMORY = "of a step: on a GPU its peak, else what is kept for backward"
"""What memory is, for the notes of tables."""


def with_progress(
    rounds: Iterable[T], total: int, console: Console, doing: str = "timing"
) -> Iterable[T]:
    """`rounds`, with a progress bar on a terminal."""
    return track(
        rounds,
        doing,
        total=total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def clock(runtime: Runtime) -> Callable[[], float]:
    """The clock for timing steps; with one thread of a CPU, the processor time of this process.

    Other programs on the machine then do not count, except through shared caches.
    """
    alone = runtime.threads == 1 and not runtime.on_gpu
    return time.process_time if alone else time.perf_counter


class Result(Protocol):
    """What a benchmark has measured."""

    def to_json(self) -> dict[str, Any]:
        """The measurements for a file, with the name of the clock."""
        ...


@dataclass(frozen=True)
class Rounds:
    """The seconds of a step of every alternative, round by round."""

    rounds: list[dict[str, float]]
    clock: str
    """The function of the module `time` that measured them."""

    @property
    def timings(self) -> dict[str, Timing]:
        """The timing of each alternative."""
        names = self.rounds[0]
        return {name: Timing(tuple(seconds[name] for seconds in self.rounds)) for name in names}

    def to_json(self) -> dict[str, Any]:
        seconds = {name: list(timing.values) for name, timing in self.timings.items()}
        return {"clock": self.clock, "seconds": seconds}


def time_in_turns(
    steps: Mapping[str, Callable[[], object]],
    repeats: int,
    console: Console,
    runtime: Runtime,
    warmup: int = 3,
    doing: str = "timing",
) -> Rounds:
    """Time every step once in each of `repeats` rounds, with a progress bar on a terminal."""
    by = clock(runtime)
    turns = take_turns(steps, repeats, warmup, by)
    return Rounds(list(with_progress(turns, repeats, console, doing)), by.__name__)


def bench_table(title: str, runtime: Runtime, first: str, *columns: str) -> Table:
    """A table that says what it was measured on; the column `first` names the row."""
    about = machine(runtime)
    place = about.get("gpu", about["processor"]) or "processor unknown"
    caption = f"{place}, {count_text(runtime.threads, 'thread')}; ours: {runtime}"
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def table_of(
    title: str,
    runtime: Runtime,
    timings: Mapping[str, Timing],
    count: int,
    unit: str = "images",
    memory: Mapping[str, float] | None = None,
    relative_to: str | None = None,
) -> Table:
    """Medians and quartiles, memory, and from the medians units per second and ratios.

    Args:
        count: units in a step.
        memory: bytes of each alternative.
        relative_to: the alternative whose speed is compared with the others.
    """
    more = ["memory\nMiB"] * (memory is not None) + ["ours is\nfaster by"] * bool(relative_to)
    table = bench_table(title, runtime, "", "median\nms", "quartiles\nms", f"\n{unit}/s", *more)
    for name, timing in timings.items():
        low, high = timing.quartiles
        row = [
            name,
            milliseconds(timing.median),
            f"{milliseconds(low)}-{milliseconds(high)}",
            f"{count / timing.median:,.0f}",
        ]
        if memory is not None:
            row.append(f"{memory[name] / 2**20:,.1f}")
        if relative_to:
            faster = timing.median / timings[relative_to].median
            row.append("" if name == relative_to else f"{faster:.2f} x")
        table.add_row(*row)
    return table


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.{1 if seconds < 1 else 0}f}"


def write_json(out: Path, options: BenchOptions, runtime: Runtime, result: Result) -> None:
    """Write the settings, the machine and versions, and the result."""
    files = ("out", "plot")
    settings = {name: value for name, value in asdict(options).items() if name not in files}
    content = {
        "settings": settings,
        "runtime": asdict(runtime),
        "machine": machine(runtime),
        "versions": versions(),
        **result.to_json(),
    }
    write_output(out, json.dumps(content, indent=1).encode() + b"\n")
