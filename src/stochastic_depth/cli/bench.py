"""stochastic-depth bench overhead."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stochastic_depth.bench.overhead import NETWORKS, closed_unit_seconds, training_steps
from stochastic_depth.timing import Timing, paired_ratio, take_turns
from stochastic_depth.train.config import Config
from stochastic_depth.train.execution import machine, resolve_execution
from stochastic_depth.train.files import write_whole


@dataclass(frozen=True)
class Overhead:
    what: Annotated[tyro.conf.Positional[Literal["overhead"]], tyro.conf.arg(metavar="overhead")]
    """The cost of the library with all gates open."""
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


def main(arguments: list[str]) -> int:
    asked = tyro.cli(
        Overhead,
        prog="stochastic-depth bench",
        description="Time alternatives in turns, in one process.",
        args=arguments,
    )
    console = Console()
    execution = resolve_execution(Config(device=asked.device, precision=asked.precision))
    steps = training_steps(asked.depth, asked.batch, asked.size, 3, execution)
    rounds = list(
        track(
            take_turns(steps, asked.repeats),
            "timing",
            total=asked.repeats,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
    )
    table = Table(title=f"A training step of ResNet-{asked.depth}, batch {asked.batch}")
    for name in ("", "median", "quartiles", "images/s"):
        table.add_column(name, justify="right" if name else "left")
    timings = {name: Timing(tuple(seconds[name] for seconds in rounds)) for name in NETWORKS}
    for name, timing in timings.items():
        low, high = timing.quartiles
        table.add_row(
            name,
            f"{1e3 * timing.median:.1f} ms",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{asked.batch / timing.median:,.0f}",
        )
    without, applied = NETWORKS
    ratio = timings[applied].median / timings[without].median
    paired = paired_ratio(rounds, applied, without)
    low, high = paired.quartiles
    console.print(table)
    console.print(
        f"cost of the library: {100 * (ratio - 1):+.2f} % by medians; round by round "
        f"{100 * (paired.median - 1):+.2f} % ({100 * (low - 1):+.2f} to {100 * (high - 1):+.2f})",
        highlight=False,
    )
    closed = closed_unit_seconds()
    console.print(
        f"a closed unit of a foreign model: {1e6 * closed:.2f} microseconds a forward pass, gates "
        "drawn and handed out",
        highlight=False,
    )
    if asked.out is not None:
        settings = {k: v for k, v in asdict(asked).items() if k != "out"}
        content = {
            "settings": settings,
            "execution": asdict(execution),
            "machine": machine(execution),
            "ratio_of_medians": ratio,
            "median_of_ratios": statistics.median(paired.seconds),
            "closed_unit_seconds": closed,
            "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
        }
        write_whole(asked.out, json.dumps(content, indent=1).encode() + b"\n")
    return 0
