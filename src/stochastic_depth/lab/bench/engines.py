"""All engines and kernels side by side."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.block_program.library import peak, why_unavailable
from stochastic_depth.lab.bench.costs import step_flops
from stochastic_depth.lab.bench.results import (
    Rounds,
    bench_table,
    milliseconds,
    time_in_turns,
    with_progress,
)
from stochastic_depth.lab.bench.workload import (
    EngineStep,
    PlainResNet,
    Step,
    Workload,
    active_share,
)
from stochastic_depth.lab.options import EnginesOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.survival import Uniform
from stochastic_depth.train.engine_choice import EngineName, KernelsName
from stochastic_depth.train.runtime import Runtime

SHARES = 1.0, 0.75, 0.5
"""The shares of blocks that are open."""
DESIGNS: dict[str, tuple[EngineName, KernelsName]] = {
    "eager": ("eager", "reference"),
    "compiled blocks": ("compiled", "reference"),
    "program, PyTorch's kernels": ("program", "reference"),
    "program, compiled kernels": ("program", "compiled"),
    "program, native kernels": ("program", "native"),
}
"""The engine and the kernels of each row of the table."""


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
    on_cpu = not runtime.on_gpu
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


@dataclass(frozen=True)
class MachinePeak:
    """The peak of this machine, and the FLOPs of a step at constant depth."""

    flops_per_second: float
    """FLOPs per second of a loop of independent multiply-adds, on as many threads as the steps."""
    flops_per_step: int
    """Forward and backward, counted as 2 per multiply-add."""

    @property
    def seconds(self) -> float:
        """The seconds of a step that does nothing but its multiply-adds, at peak speed."""
        return self.flops_per_step / self.flops_per_second


def machine_peak(runtime: Runtime, constant: Step) -> MachinePeak | None:
    """Measure the peak; None on a GPU, and where no compiler can build the loop.

    Args:
        constant: a step at constant depth, by autograd, whose FLOPs are counted.
    """
    if runtime.on_gpu or why_unavailable() is not None:
        return None
    return MachinePeak(peak(runtime.dtype, runtime.threads), step_flops(constant))


@dataclass(frozen=True)
class EnginesResult:
    """The steps of every design at every share of active blocks, and why others are missing."""

    timed: Rounds
    designs: Mapping[str, Runtime]
    missing: Mapping[str, str]
    peak: MachinePeak | None

    @property
    def of_the_peak(self) -> dict[str, float]:
        """The share of the peak that each design reaches; empty where that was not measured."""
        if self.peak is None:
            return {}
        timings, least = self.timed.timings, self.peak.seconds
        return {name: least / timings[f"{name} 100 %"].median for name in self.designs}

    def to_json(self) -> dict[str, Any]:
        return {
            **self.timed.to_json(),
            "peak": self.peak and {**asdict(self.peak), "of_the_peak": self.of_the_peak},
            "missing": dict(self.missing),
            "designs": {
                name: {"engine": runtime.engine, "kernels": runtime.kernels}
                for name, runtime in self.designs.items()
            },
        }


def measure(options: EnginesOptions, runtime: Runtime, console: Console) -> EnginesResult:
    """Time every design that this machine can run, with all blocks active and with fewer."""
    workload = Workload(options.batch, options.size, 3, runtime)
    there, absent = designs(runtime)
    count = len(there) * len(SHARES)
    built = with_progress(engine_steps(options.depth, workload, there), count, console, "building")
    steps = {f"{name} {100 * share:.0f} %": step for name, share, step in built}
    timed = time_in_turns(steps, options.repeats, console, runtime)
    reached = machine_peak(runtime, workload.step(PlainResNet(options.depth)))
    return EnginesResult(timed, there, absent, reached)


def tables(
    result: EnginesResult, options: EnginesOptions, runtime: Runtime
) -> Iterator[Table | str]:
    yield _engines_table(result, options, runtime)
    yield "milliseconds of a step, median and quartiles, by the share of active blocks"
    for name, reason in result.missing.items():
        yield f"{name}: {reason}"


def _engines_table(result: EnginesResult, options: EnginesOptions, runtime: Runtime) -> Table:
    title = f"A training step of ResNet-{options.depth}, batch {options.batch}"
    shares = [f"{100 * share:.0f} %" for share in SHARES]
    timings, of_the_peak = result.timed.timings, result.of_the_peak
    more = ["of the\npeak"] if of_the_peak else []
    runtime = replace(runtime, engine_because="and the other engines, a row each")
    table = bench_table(title, runtime, "", *shares, "images/s\nat 100 %", *more)
    for name in result.designs:
        of_name = [timings[f"{name} {share}"] for share in shares]
        table.add_row(
            name,
            *("{}\n{}-{}".format(*map(milliseconds, (t.median, *t.quartiles))) for t in of_name),
            f"{options.batch / of_name[0].median:,.0f}",
            *([f"{of_the_peak[name]:.2f}"] if of_the_peak else []),
        )
    if result.peak is not None:
        least = result.peak.seconds
        row = milliseconds(least), "", "", f"{options.batch / least:,.0f}", "1"
        table.add_row("at the machine's peak", *row)
    return table
