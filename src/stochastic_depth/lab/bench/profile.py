"""Where the time of a training step goes, by operator and by piece of the block program."""

import itertools
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEventAvg
from torch.profiler import ProfilerActivity, profile

from stochastic_depth.block_program import Program
from stochastic_depth.block_program.pieces import BlockPiece
from stochastic_depth.lab.bench.results import bench_table, with_progress
from stochastic_depth.lab.bench.workload import Step, Workload
from stochastic_depth.lab.options import ProfileOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.engines import KERNELS
from stochastic_depth.train.runtime import Runtime


def operators(step: Step, steps: int, on_gpu: bool) -> dict[str, float]:
    """Seconds of `step` in each operator itself, as from `own_seconds`."""
    step()
    # Without this the profiler prints when it starts and ends.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    return own_seconds(recorded.key_averages(), steps, on_gpu)


def own_seconds(averages: Iterable[FunctionEventAvg], steps: int, on_gpu: bool) -> dict[str, float]:
    """Seconds of a step in each operator, without those that it calls; the longest first.

    Args:
        averages: the events of `steps` steps, by name.
        on_gpu: whether to count the time of an operator's kernels on the GPU; otherwise it is that
            of the operator on the CPU. Of kernels there are also events of their own, which do not
            count again.
    """
    seconds: dict[str, float] = {}
    for event in averages:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0 and event.cpu_time_total > 0:  # kernels take no time on the CPU
            seconds[str(event.key)] = 1e-6 * own / steps
    return dict(sorted(seconds.items(), key=lambda item: item[1], reverse=True))


class TimedReplay:
    """A `Replay` that runs the work as it is, and measures how long it takes."""

    is_fixed = False

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """The seconds of each call, by piece."""

    def warm_up(self, work: Callable[[], None]) -> None:
        pass

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        name = _piece_name(work)

        def timed() -> None:
            self._synchronise()
            began = time.perf_counter()
            work()
            self._synchronise()
            self.seconds[name].append(time.perf_counter() - began)

        return timed


def _piece_name(work: Any) -> str:
    """The name of a piece of the block program: its kind, channels and direction."""
    piece, direction = work.__self__, work.__name__.replace("_", " ")
    if not isinstance(piece, BlockPiece):
        return f"{type(piece).__name__.lower()}, {direction}"
    kind = "transition to" if piece.is_transition else "block of"
    return f"{kind} {piece.out.shape[1]} channels, {direction}"


def pieces(depth: int, workload: Workload) -> tuple[TimedReplay, Step]:
    """A step of a ResNet's block program, and the recorder of the seconds of its pieces."""
    runtime = workload.runtime
    model = CifarResNet(depth, channels=workload.channels)
    model.to(device=runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = workload.images().to(runtime.device)
    labels = (torch.arange(workload.batch) % 10).to(runtime.device)
    timed = TimedReplay(runtime.synchronise)
    program = Program(
        model.train(),
        None,
        build_optimizer(OptimizerConfig(), model),
        images.shape,
        runtime.dtype,
        KERNELS[runtime.kernels](runtime.dtype),
        timed,
    )
    return timed, lambda: program.step(images, labels)


SHOWN = 15
"""How many operators are in the table; the file has all of them."""


@dataclass(frozen=True)
class ProgramTimes:
    """The medians of the steps of a block program, and of its pieces."""

    step: float
    rest: float
    """What is between the pieces."""
    pieces: Mapping[str, tuple[int, float]]
    """How often each piece runs in a step, and its seconds."""

    def to_json(self) -> dict[str, Any]:
        pieces = {name: {"count": n, "seconds": s} for name, (n, s) in self.pieces.items()}
        return {"step": self.step, "rest": self.rest, **pieces}


@dataclass(frozen=True)
class ProfileResult:
    """The seconds of each operator in a step, as from `own_seconds`, on the GPU if there is one.

    And the times of the block program if it was run.
    """

    operators: Mapping[str, float]
    program: ProgramTimes | None

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"clock": "perf_counter", "operators": dict(self.operators)}
        return found if self.program is None else {**found, "pieces": self.program.to_json()}


def measure(options: ProfileOptions, runtime: Runtime, console: Console) -> ProfileResult:
    """Measure where the time of a step goes, by operator and by piece of the block program."""
    workload = Workload(options.batch, options.size, 3, runtime)
    on_gpu = runtime.on_gpu
    by_operator = operators(workload.step(CifarResNet(options.depth)), 3, on_gpu)
    if runtime.engine != "program":
        return ProfileResult(by_operator, None)
    return ProfileResult(by_operator, _program_times(options, workload, console))


def tables(
    result: ProfileResult, options: ProfileOptions, runtime: Runtime
) -> Iterator[Table | str]:
    yield _operators_table(options, runtime, result.operators)
    if result.program is not None:
        yield _pieces_table(options, runtime, result.program)


def _operators_table(
    options: ProfileOptions, runtime: Runtime, seconds: Mapping[str, float]
) -> Table:
    whole = sum(seconds.values())
    title = f"ResNet-{options.depth} by autograd, {1e3 * whole:,.0f} ms a step"
    table = bench_table(title, runtime, "operator", "ms", "share")
    for name, of_operator in list(seconds.items())[:SHOWN]:
        table.add_row(name, f"{1e3 * of_operator:.2f}", f"{100 * of_operator / whole:.1f} %")
    return table


def _program_times(options: ProfileOptions, workload: Workload, console: Console) -> ProgramTimes:
    replay, step = pieces(options.depth, workload)
    for _ in range(3):
        step()
    replay.seconds.clear()
    whole, inside = [], [0.0]
    for _ in with_progress(range(options.repeats), options.repeats, console):
        began = time.perf_counter()
        step()
        whole.append(time.perf_counter() - began)
        inside.append(sum(map(sum, replay.seconds.values())))
    between = [
        step - (after - before)
        for step, (before, after) in zip(whole, itertools.pairwise(inside), strict=True)
    ]
    of_pieces = {
        name: (len(seconds) // options.repeats, statistics.median(seconds))
        for name, seconds in replay.seconds.items()
    }
    return ProgramTimes(statistics.median(whole), statistics.median(between), of_pieces)


def _pieces_table(options: ProfileOptions, runtime: Runtime, program: ProgramTimes) -> Table:
    step = f"{1e3 * program.step:,.0f} ms a step"
    title = f"ResNet-{options.depth} by block program, {runtime.kernels} kernels, {step}"
    table = bench_table(title, runtime, "piece", "median, ms", "in a step")
    for name, (count, seconds) in program.pieces.items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{count}")
    table.add_row("cast, update, gates", f"{1e3 * program.rest:.2f}", "1")
    return table
