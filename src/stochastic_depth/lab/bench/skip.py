"""What skipping saves: time against the share of the FLOPs that is spent."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stochastic_depth.handle import Handle
from stochastic_depth.lab.bench.results import bench_table, clock, with_progress
from stochastic_depth.lab.bench.workload import Step, Workload, active_share, saved_for_backward
from stochastic_depth.lab.options import SkipOptions
from stochastic_depth.lab.titles import CONSTANT
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import summary
from stochastic_depth.survival import LinearDecay, Survival, Uniform
from stochastic_depth.timing import take_turns
from stochastic_depth.train.runtime import Runtime


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

    @property
    def efficiency_quartiles(self) -> list[float] | None:
        """The quartiles of `efficiencies`; None for fewer than two rounds."""
        values = self.efficiencies
        return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else None


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
        self.clock = clock(workload.runtime)
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
        for seconds in take_turns(self.steps, repeats, clock=self.clock):
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


@dataclass(frozen=True)
class SkipResult:
    """The steps of each alternative, and what they kept."""

    alternatives: Mapping[str, Skipping]
    memory: Mapping[str, tuple[float, float]]
    """As from `Skip.memory`."""
    clock: str

    def to_json(self) -> dict[str, Any]:
        rows: dict[str, Any] = {}
        for name, found in self.alternatives.items():
            kept, active = self.memory[name]
            rows[name] = {
                **asdict(found),
                "efficiency_quartiles": found.efficiency_quartiles,
                "kept_for_backward": kept,
                "active_blocks": active,
            }
        return {"clock": self.clock, "alternatives": rows}


def measure(options: SkipOptions, runtime: Runtime, console: Console) -> SkipResult:
    """Time constant depth, two p_L and fixed shares of the blocks, in turns."""
    skip = Skip(options.depth, Workload(options.batch, options.size, 3, runtime))
    rounds = list(with_progress(skip.rounds(options.repeats), options.repeats, console))
    memory = {name: skip.memory(name, 3) for name in skip.steps}
    return SkipResult(skippings(rounds), memory, skip.clock.__name__)


def tables(result: SkipResult, options: SkipOptions, runtime: Runtime) -> Iterator[Table | str]:
    title = f"Training steps of ResNet-{options.depth}, batch {options.batch}"
    columns = ("median", "time", "FLOPs", "efficiency", "kept", "blocks")
    table = bench_table(title, runtime, "", *columns)
    for name, found in result.alternatives.items():
        kept, active = result.memory[name]
        quartiles = found.efficiency_quartiles
        table.add_row(
            name,
            f"{1e3 * statistics.median(found.seconds):.1f} ms",
            f"{statistics.median(found.relative):.3f}",
            f"{statistics.mean(found.active):.3f}",
            "{1:.2f} ({0:.2f}-{2:.2f})".format(*quartiles) if quartiles else "",
            f"{kept:.3f}",
            f"{active:.3f}",
        )
    yield table
    yield (
        "time, FLOPs, bytes kept for backward, active blocks: of constant depth's\n"
        "efficiency: time saved over FLOPs saved, median and quartiles of the rounds"
    )
