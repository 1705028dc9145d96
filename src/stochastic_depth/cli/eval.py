"""stochastic-depth eval RUN."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.train import reopen, trained_model
from stochastic_depth.train.step import evaluate_parts


@dataclass(frozen=True)
class Evaluate:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where its data is now (none: where it was)."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(
        Evaluate,
        prog="stochastic-depth eval",
        description="Loss and error of a trained network at full depth.",
        args=arguments,
    )
    run, images = reopen(asked.run, asked.data)
    model, step = trained_model(run, images, asked.checkpoint)
    table = Table(
        title=f"{run.path}, {asked.checkpoint} checkpoint (step {step})", title_justify="left"
    )
    for name in ("part", "images", "loss", "error"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, (loss, error) in evaluate_parts(model, images, run.execution).items():
        table.add_row(part, f"{images.sizes[part]:,}", f"{loss:.4f}", f"{error:.2f} %")
    PlainConsole().print(table)
    return 0
