"""What skipping saves, and what the library costs."""

import statistics
import timeit
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from stochastic_depth.handle import Handle
from stochastic_depth.lab.bench.costs import AT_PEAK, MachinePeak, machine_peak
from stochastic_depth.lab.bench.engines import active_share
from stochastic_depth.lab.bench.results import (
    bench_table,
    clock,
    milliseconds,
    shown,
    table_of,
    timings,
)
from stochastic_depth.lab.bench.workload import (
    PlainResNet,
    Step,
    Workload,
    copy_weights,
    saved_for_backward,
)
from stochastic_depth.lab.options import OverheadOptions, SkipOptions
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import apply, summary
from stochastic_depth.survival import LinearDecay, Survival, Uniform
from stochastic_depth.timing import paired_ratio, take_turns
from stochastic_depth.train.runtime import Runtime

CONSTANT = "constant depth"


def alternatives(blocks: int) -> dict[str, tuple[Survival, list[bool] | None]]:
    """What is timed: linear decay, and fixed shares of the blocks, whose gates are forced."""
    return {
        CONSTANT: (Uniform(1.0), None),
        "p_L = 0.5": (LinearDecay(0.5), None),
        "p_L = 0.2": (LinearDecay(0.2), None),
        **{
            f"{100 * share:.0f} % of blocks": (Uniform(1.0), active_share(blocks, share))
            for share in (0.75, 0.5, 0.25)
        },
    }


@dataclass(frozen=True)
class Skipping:
    """Training steps of one alternative, round by round."""

    seconds: tuple[float, ...]
    relative: tuple[float, ...]
    """The time relative to constant depth in the same round."""
    active: tuple[float, ...]
    """The share of the FLOPs of constant depth that was spent."""

    @property
    def efficiencies(self) -> list[float]:
        """Time saved over FLOPs saved, round by round; none where no FLOPs are saved."""
        return [
            (1 - time) / (1 - flops)
            for time, flops in zip(self.relative, self.active, strict=True)
            if flops < 1
        ]


Round = dict[str, tuple[float, float]]


def skippings(rounds: Sequence[Round]) -> dict[str, Skipping]:
    """The results of `rounds`, by alternative."""
    return {
        name: Skipping(
            tuple(r[name][0] for r in rounds),
            tuple(r[name][0] / r[CONSTANT][0] for r in rounds),
            tuple(r[name][1] for r in rounds),
        )
        for name in rounds[0]
    }


class Skip:
    """The alternatives, each with its own network."""

    def __init__(self, depth: int, workload: Workload) -> None:
        self.workload = workload
        self._handles: dict[str, Handle] = {}
        self.steps: dict[str, Step] = {}
        for name, (survival, gates) in alternatives((depth - 2) // 2).items():
            model = CifarResNet(depth, channels=workload.channels)
            step = self.steps[name] = workload.engine_step(model, survival, gates)
            assert step.handle is not None
            self._handles[name] = step.handle
            if name == CONSTANT:
                image = torch.randn(1, workload.channels, workload.size, workload.size)
                self._costs = summary(model, image)

    def rounds(self, repeats: int) -> Iterator[Round]:
        """Take turns: yields seconds and the share of FLOPs that was spent, by alternative."""
        by = clock(self.workload.runtime)
        for seconds in take_turns(self.steps, repeats, clock=by):
            yield {name: (seconds[name], self.active_flops(name)) for name in self.steps}

    def active_flops(self, name: str) -> float:
        """The share of the FLOPs of constant depth that the last step spent."""
        return 1 - self._costs.saving(self._handles[name].gates.tolist())

    def memory(self, name: str, steps: int) -> tuple[float, float]:
        """The bytes kept for backward and the number of active blocks, relative to constant depth.

        Both are means over `steps` steps.
        """
        full = saved_for_backward(self.steps[CONSTANT])
        saved, active = [], []
        for _ in range(steps):
            saved.append(saved_for_backward(self.steps[name]) / full)
            active.append(self._handles[name].gates.double().mean().item())
        return statistics.mean(saved), statistics.mean(active)


NETWORKS = ("without the library", "applied, all gates open")


def overhead_steps(depth: int, workload: Workload) -> dict[str, Step]:
    """One training step of each of `NETWORKS`, on the same weights and images."""
    channels = workload.channels
    applied, plain = CifarResNet(depth, channels=channels), PlainResNet(depth, channels)
    copy_weights(applied, plain)
    apply(applied, Uniform(1.0))
    steps = map(workload.step, (plain, applied))
    return dict(zip(NETWORKS, steps, strict=True))


class _Unit(nn.Module):
    """A residual unit as in a model of any author."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def closed_unit_seconds(units: int = 100, passes: int = 1000) -> float:
    """The seconds that a closed unit adds to a training forward pass, over a module that returns x.

    They include drawing the gates, handing them to the blocks, and the call. The fastest of
    `passes` counts.
    """
    x = torch.ones(2, 1)
    model = nn.Sequential(*(_Unit() for _ in range(units)))
    handle = apply(model, Uniform(0.5), example=x)
    nothing = nn.Sequential(*(nn.Identity() for _ in range(units)))
    with handle.forced([True] + [False] * (units - 1)):  # one is open, so that there is a graph
        closed, returned = (
            min(timeit.repeat(lambda m=m: m(x), number=1, repeat=passes)) for m in (model, nothing)
        )
    drawn = min(timeit.repeat(lambda: handle.gates_at(0), number=1, repeat=passes))
    return (closed + drawn - returned) / units


def overhead(options: OverheadOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    """Time the library with all gates open against the same network written without it."""
    steps = overhead_steps(options.depth, Workload(options.batch, options.size, 3, runtime))
    rounds = list(shown(take_turns(steps, options.repeats), options.repeats, console))
    timed = timings(rounds)
    title = f"A training step of ResNet-{options.depth}, batch {options.batch}"
    console.print(table_of(title, runtime, timed, options.batch))
    without, applied = NETWORKS
    ratio = timed[applied].median / timed[without].median
    paired = paired_ratio(rounds, applied, without)
    low, high = paired.quartiles
    console.print(
        f"cost of the library: {100 * (ratio - 1):+.2f} % by medians; round by round "
        f"{100 * (paired.median - 1):+.2f} % ({100 * (low - 1):+.2f} to "
        f"{100 * (high - 1):+.2f})",
    )
    closed = closed_unit_seconds()
    console.print(
        f"a closed unit of a foreign model: {1e6 * closed:.2f} microseconds a forward pass",
    )
    return {
        "ratio_of_medians": ratio,
        "median_of_ratios": paired.median,
        "closed_unit_seconds": closed,
        "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
    }


def skip(options: SkipOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    """Time constant depth, two p_L and fixed shares of the blocks, in turns."""
    bench = Skip(options.depth, Workload(options.batch, options.size, 3, runtime))
    rounds = list(shown(bench.rounds(options.repeats), options.repeats, console))
    title = f"Training steps of ResNet-{options.depth}, batch {options.batch}"
    plain = PlainResNet(options.depth, bench.workload.channels)
    peak = machine_peak(runtime, bench.workload.step(plain))
    columns = ("median", "time", "FLOPs", "efficiency", "kept", "blocks")
    table = bench_table(title, runtime, "", *columns)
    rows: dict[str, Any] = {}
    for name, result in skippings(rounds).items():
        kept, active = bench.memory(name, 3)
        efficiencies = result.efficiencies
        quartiles = (
            statistics.quantiles(efficiencies, n=4, method="inclusive")
            if len(efficiencies) > 1
            else None
        )
        rows[name] = {
            **asdict(result),
            "efficiency_quartiles": quartiles,
            "kept_for_backward": kept,
            "active_blocks": active,
        }
        shares = [] if peak is None else _shares(peak, result)
        if shares:
            rows[name]["of_the_peak"] = statistics.median(shares)
        table.add_row(
            name,
            f"{1e3 * statistics.median(result.seconds):.1f} ms",
            f"{statistics.median(result.relative):.3f}",
            f"{statistics.mean(result.active):.3f}",
            "{1:.2f} ({0:.2f}-{2:.2f})".format(*quartiles) if quartiles else "",
            f"{kept:.3f}",
            f"{active:.3f}",
        )
    if peak is not None:
        table.add_row(AT_PEAK, f"{milliseconds(peak.timing.median)} ms", *[""] * 5)
    console.print(table)
    console.print(
        "time, FLOPs, bytes kept for backward, active blocks: of constant depth's\n"
        "efficiency: time saved over FLOPs saved, median and quartiles of the rounds",
    )
    if peak is not None:
        reached = ", ".join(f"{row['of_the_peak']:.2f}" for row in rows.values())
        console.print(f"of the machine's peak, of which the last row is 1: {reached}")
    return {"alternatives": rows, "peak": peak and peak.to_json({})}


def _shares(peak: MachinePeak, result: Skipping) -> list[float]:
    """The share of the machine's peak that each step reached."""
    return [peak.share(*step) for step in zip(result.seconds, result.active, strict=True)]
