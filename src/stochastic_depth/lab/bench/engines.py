"""All engines and kernels side by side, and where the time of a training step goes."""

import itertools
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from stochastic_depth.block_program import Program
from stochastic_depth.block_program.library import why_unavailable
from stochastic_depth.block_program.pieces import BlockPiece
from stochastic_depth.lab.bench.costs import AT_PEAK, MachinePeak, machine_peak
from stochastic_depth.lab.bench.results import bench_table, clock, milliseconds, shown, timings
from stochastic_depth.lab.bench.workload import EngineStep, PlainResNet, Step, Workload
from stochastic_depth.lab.options import EnginesOptions, ProfileOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.survival import Uniform
from stochastic_depth.timing import take_turns
from stochastic_depth.train.build import build_optimizer
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.engine_choice import EngineName, KernelsName
from stochastic_depth.train.engines import KERNELS
from stochastic_depth.train.runtime import Runtime

SHARES = 1.0, 0.75, 0.5

DESIGNS: dict[str, tuple[EngineName, KernelsName]] = {
    "eager": ("eager", "reference"),
    "compiled blocks": ("compiled", "reference"),
    "graphs, PyTorch's kernels": ("graphs", "reference"),
    "graphs, compiled kernels": ("graphs", "compiled"),
    "graphs, native kernels": ("graphs", "native"),
}


def active_share(blocks: int, share: float) -> list[bool]:
    """Gates that open `share` of the blocks, spread evenly over the depth."""
    count = [int(share * n) for n in range(blocks + 1)]
    return [after > before for before, after in itertools.pairwise(count)]


def designs(runtime: Runtime) -> tuple[dict[str, Runtime], dict[str, str]]:
    """The designs that this machine can run, and the reasons why it cannot run the others."""
    there, absent = {}, {}
    for name, (engine, kernels) in DESIGNS.items():
        reason = _obstacle(engine, kernels, runtime)
        if reason is None:
            there[name] = replace(runtime, engine=engine, kernels=kernels)
        else:
            absent[name] = reason
    return there, absent


def _obstacle(engine: EngineName, kernels: KernelsName, runtime: Runtime) -> str | None:
    on_cpu = torch.device(runtime.device).type == "cpu"
    if kernels == "native":
        if not on_cpu:
            return "they are for a CPU"
        return why_unavailable()
    if "compiled" in (engine, kernels) and on_cpu and shutil.which("g++") is None:
        return "no g++ was found, which PyTorch's compiler needs"
    return None


def engine_steps(
    depth: int, workload: Workload, names: dict[str, Runtime]
) -> Iterator[tuple[str, float, EngineStep]]:
    """The design, the share of active blocks and the training step, each for its own network."""
    for name, runtime in names.items():
        for share in SHARES:
            model = CifarResNet(depth, channels=workload.channels)
            gates = active_share((depth - 2) // 2, share)
            step = replace(workload, runtime=runtime).engine_step(model, Uniform(1.0), gates)
            yield name, share, step


def operators(step: Step, steps: int) -> dict[str, float]:
    """Seconds of `step` in each operator itself, on the GPU if there is one; the longest first."""
    step()
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # otherwise the profiler records its start and end
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
    microseconds = {
        event.key: event.self_device_time_total or event.self_cpu_time_total
        for event in recorded.key_averages()
    }
    longest = sorted(microseconds, key=microseconds.__getitem__, reverse=True)
    return {name: 1e-6 * microseconds[name] / steps for name in longest}


class Timed:
    """A `Replay` that runs the work as it is, and measures how long it takes."""

    keeps = False

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """The seconds of each call, by piece."""

    def warm_up(self, work: Callable[[], None]) -> None:
        pass

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        name = _named(work)

        def timed() -> None:
            self._synchronise()
            began = time.perf_counter()
            work()
            self._synchronise()
            self.seconds[name].append(time.perf_counter() - began)

        return timed


def _named(work: Any) -> str:
    """The name of a piece of the block program: its kind, channels and direction."""
    piece, direction = work.__self__, work.__name__.replace("_", " ")
    if not isinstance(piece, BlockPiece):
        return f"{type(piece).__name__.lower()}, {direction}"
    kind = "transition to" if piece.is_transition else "block of"
    return f"{kind} {piece.out.shape[1]} channels, {direction}"


def pieces(depth: int, workload: Workload) -> tuple[Timed, Step]:
    """A step of a ResNet's block program, and the recorder of the seconds of its pieces."""
    runtime = workload.runtime
    model = CifarResNet(depth, channels=workload.channels)
    model.to(device=runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    images = workload.images().to(runtime.device)
    labels = (torch.arange(workload.batch) % 10).to(runtime.device)
    timed = Timed(runtime.synchronise)
    dtype = torch.bfloat16 if runtime.precision == "bfloat16" else torch.float32
    program = Program(
        model.train(),
        None,
        build_optimizer(OptimizerConfig(), model),
        images.shape,
        dtype,
        KERNELS[runtime.kernels](dtype),
        timed,
    )
    return timed, lambda: program.step(images, labels)


def bench_engines(options: EnginesOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    """Time every design that this machine can run, with all blocks active and with fewer."""
    workload = Workload(options.batch, options.size, 3, runtime)
    names, absent = designs(runtime)
    built = shown(
        engine_steps(options.depth, workload, names), len(names) * len(SHARES), console, "building"
    )
    steps = {f"{name} {100 * share:.0f} %": step for name, share, step in built}
    rounds = list(
        shown(take_turns(steps, options.repeats, clock=clock(runtime)), options.repeats, console)
    )
    timed = timings(rounds)
    peak = machine_peak(runtime, workload.step(PlainResNet(options.depth)))
    console.print(_engines_table(options, runtime, list(names), timed, peak))
    console.print("milliseconds of a step, median and quartiles, by the share of active blocks")
    for name, reason in absent.items():
        console.print(f"{name}: {reason}")
    return {
        "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
        "peak": peak and peak.to_json({n: timed[f"{n} 100 %"].median for n in names}),
        "missing": absent,
    }


def _engines_table(
    options: EnginesOptions,
    runtime: Runtime,
    names: list[str],
    timed: dict[str, Any],
    peak: MachinePeak | None,
) -> Table:
    title = f"A training step of ResNet-{options.depth}, batch {options.batch}"
    shares = [f"{100 * share:.0f} %" for share in SHARES]
    more = [] if peak is None else ["of the\npeak"]
    table = bench_table(title, runtime, "", *shares, "images/s\nat 100 %", *more)
    for name in names:
        of_name = [timed[f"{name} {share}"] for share in shares]
        table.add_row(
            name,
            *("{}\n{}-{}".format(*map(milliseconds, (t.median, *t.quartiles))) for t in of_name),
            f"{options.batch / of_name[0].median:,.0f}",
            *([] if peak is None else [f"{peak.share(of_name[0].median):.2f}"]),
        )
    if peak is not None:
        least = peak.timing.median
        table.add_row(AT_PEAK, milliseconds(least), "", "", f"{options.batch / least:,.0f}", "1")
    return table


SHOWN = 15
"""How many operators are in the table; the file has all of them."""


def bench_profile(options: ProfileOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    """Show where the time of a step goes, by operator and by piece of the block program."""
    workload = Workload(options.batch, options.size, 3, runtime)
    by_operator = operators(workload.step(CifarResNet(options.depth)), steps=3)
    console.print(_operators_table(options, runtime, by_operator))
    result: dict[str, Any] = {"operators": by_operator}
    if runtime.engine == "graphs":
        result["pieces"] = _timed_pieces(options, workload, console)
    return result


def _operators_table(options: ProfileOptions, runtime: Runtime, seconds: dict[str, float]) -> Table:
    whole = sum(seconds.values())
    title = f"ResNet-{options.depth} by autograd, {1e3 * whole:,.0f} ms a step"
    table = bench_table(title, runtime, "operator", "ms", "share")
    for name, of_operator in list(seconds.items())[:SHOWN]:
        table.add_row(name, f"{1e3 * of_operator:.2f}", f"{100 * of_operator / whole:.1f} %")
    return table


def _timed_pieces(options: ProfileOptions, workload: Workload, console: Console) -> dict[str, Any]:
    timed, step = pieces(options.depth, workload)
    for _ in range(3):
        step()
    timed.seconds.clear()
    whole, inside = [], [0.0]
    for _ in shown(range(options.repeats), options.repeats, console):
        began = time.perf_counter()
        step()
        whole.append(time.perf_counter() - began)
        inside.append(sum(map(sum, timed.seconds.values())))
    between = [
        step - (after - before)
        for step, (before, after) in zip(whole, itertools.pairwise(inside), strict=True)
    ]
    kernels, step_ms = workload.runtime.kernels, 1e3 * statistics.median(whole)
    title = f"ResNet-{options.depth} by block program, {kernels} kernels, {step_ms:,.0f} ms a step"
    table = bench_table(title, workload.runtime, "piece", "median, ms", "in a step")
    result = {}
    for name, seconds in timed.seconds.items():
        count = len(seconds) // options.repeats
        result[name] = {"count": count, "seconds": statistics.median(seconds)}
        table.add_row(name, f"{1e3 * result[name]['seconds']:.2f}", f"{count}")
    rest = statistics.median(between)
    table.add_row("cast, update, gates", f"{1e3 * rest:.2f}", "1")
    console.print(table)
    return {"step": statistics.median(whole), "rest": rest, **result}
