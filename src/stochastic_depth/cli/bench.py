"""stochastic-depth bench overhead | skip | peers."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stochastic_depth.bench.overhead import NETWORKS, closed_unit_seconds, training_steps
from stochastic_depth.bench.peers import CONSTANT, OURS, peers
from stochastic_depth.bench.skip import Skip, skippings
from stochastic_depth.bench.workload import Workload
from stochastic_depth.timing import Timing, paired_ratio, take_turns
from stochastic_depth.train.config import Config
from stochastic_depth.train.execution import machine, resolve_execution
from stochastic_depth.train.files import write_whole

T = TypeVar("T")


@dataclass(frozen=True)
class Overhead:
    """What the library costs with all gates open."""

    depth: int = 110
    """Of the CIFAR ResNet."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Height and width of the images, pixels."""
    repeats: int = 50
    """Rounds, each of one step of every alternative."""
    device: str = "auto"
    """cpu or cuda (auto: a GPU if there is one)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and products."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result as JSON here."""

    def run(self, workload: Workload, console: Console) -> dict[str, Any]:
        steps = training_steps(self.depth, workload)
        rounds = list(_shown(take_turns(steps, self.repeats), self.repeats, console))
        timings = _timings(rounds)
        console.print(_table(f"A training step of ResNet-{self.depth}", timings, self.batch))
        without, applied = NETWORKS
        ratio = timings[applied].median / timings[without].median
        paired = paired_ratio(rounds, applied, without)
        low, high = paired.quartiles
        console.print(
            f"cost of the library: {100 * (ratio - 1):+.2f} % by medians; round by round "
            f"{100 * (paired.median - 1):+.2f} % ({100 * (low - 1):+.2f} to "
            f"{100 * (high - 1):+.2f})",
            highlight=False,
        )
        closed = closed_unit_seconds()
        console.print(
            f"a closed unit of a foreign model: {1e6 * closed:.2f} microseconds a forward pass",
            highlight=False,
        )
        return {
            "ratio_of_medians": ratio,
            "median_of_ratios": paired.median,
            "closed_unit_seconds": closed,
            "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
        }


@dataclass(frozen=True)
class SkipBench(Overhead):
    """Time against the share of FLOPs that was active."""

    repeats: int = 20
    """Rounds, each of one step of every alternative."""

    def run(self, workload: Workload, console: Console) -> dict[str, Any]:
        bench = Skip(self.depth, workload)
        rounds = list(_shown(bench.rounds(self.repeats), self.repeats, console))
        table = Table(title=f"Training steps of ResNet-{self.depth}, batch {self.batch}")
        for column in ("", "median", "time", "FLOPs", "efficiency", "kept", "blocks"):
            table.add_column(column, justify="right" if column else "left")
        rows: dict[str, Any] = {}
        for name, result in skippings(rounds).items():
            kept, active = bench.memory(name, 3)
            efficiencies = result.efficiencies
            quartiles = statistics.quantiles(efficiencies, n=4) if len(efficiencies) > 1 else None
            rows[name] = {
                **asdict(result),
                "efficiency_quartiles": quartiles,
                "kept_for_backward": kept,
                "active_blocks": active,
            }
            table.add_row(
                name,
                f"{1e3 * statistics.median(result.seconds):.1f} ms",
                f"{statistics.median(result.relative):.3f}",
                f"{statistics.mean(result.active):.3f}",
                "{1:.2f} ({0:.2f}-{2:.2f})".format(*quartiles) if quartiles else "",
                f"{kept:.3f}",
                f"{active:.3f}",
            )
        console.print(table)
        console.print(
            "time, FLOPs, bytes kept for backward, active blocks: of constant depth's\n"
            "efficiency: time saved over FLOPs saved, median and quartiles of the rounds",
            highlight=False,
        )
        return {"alternatives": rows}


@dataclass(frozen=True)
class Peers(Overhead):
    """The same network as other libraries train it."""

    repeats: int = 20
    """Rounds, each of one step of every alternative."""
    final: float = 0.5
    """p_L of linear decay."""

    def run(self, workload: Workload, console: Console) -> dict[str, Any]:
        steps, missing = peers(self.depth, self.final, workload)
        rounds = list(_shown(take_turns(steps, self.repeats), self.repeats, console))
        timings = _timings(rounds)
        title = f"ResNet-{self.depth}, p_L = {self.final}"
        console.print(_table(title, timings, self.batch, relative_to=OURS))
        for name, reason in missing.items():
            console.print(f"{name}: {reason}", markup=False, highlight=False)
        return {
            "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
            "ours_is_faster_by": {
                name: statistics.fmean(timing.seconds) / statistics.fmean(timings[OURS].seconds)
                for name, timing in timings.items()
                if name != OURS
            },
            "constant": CONSTANT,
            "missing": missing,
        }


Command = (
    Annotated[Overhead, tyro.conf.subcommand("overhead", prefix_name=False)]
    | Annotated[SkipBench, tyro.conf.subcommand("skip", prefix_name=False)]
    | Annotated[Peers, tyro.conf.subcommand("peers", prefix_name=False)]
)


def main(arguments: list[str]) -> int:
    asked = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="stochastic-depth bench",
        description="Time alternatives in turns, in one process.",
        args=arguments,
    )
    assert isinstance(asked, Overhead)
    console = Console()
    execution = resolve_execution(Config(device=asked.device, precision=asked.precision))
    workload = Workload(asked.batch, asked.size, 3, execution)
    result = asked.run(workload, console)
    if asked.out is not None:
        settings = asdict(replace(asked, out=None))
        del settings["out"]
        content = {
            "settings": settings,
            "execution": asdict(execution),
            "machine": machine(execution),
            **result,
        }
        write_whole(asked.out, json.dumps(content, indent=1).encode() + b"\n")
    return 0


def _shown(rounds: Iterable[T], total: int, console: Console) -> Iterable[T]:
    return track(
        rounds,
        "timing",
        total=total,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _timings(rounds: list[dict[str, float]]) -> dict[str, Timing]:
    return {name: Timing(tuple(seconds[name] for seconds in rounds)) for name in rounds[0]}


def _table(
    title: str, timings: dict[str, Timing], batch: int, relative_to: str | None = None
) -> Table:
    """Medians, quartiles, images a second, and how much faster the last one is."""
    table = Table(title=f"{title}, batch {batch}")
    columns = ["", "median", "quartiles", "images/s"]
    for name in [*columns, *(["ours is faster by"] if relative_to else [])]:
        table.add_column(name, justify="right" if name else "left")
    for name, timing in timings.items():
        low, high = timing.quartiles
        mean = statistics.fmean(timing.seconds)
        row = [
            name,
            f"{1e3 * timing.median:.1f} ms",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{batch / mean:,.0f}",
        ]
        if relative_to:
            ours = statistics.fmean(timings[relative_to].seconds)
            row.append("" if name == relative_to else f"{mean / ours:.2f} x")
        table.add_row(*row)
    return table
