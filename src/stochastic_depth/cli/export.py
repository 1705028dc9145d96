"""stochastic-depth export RUN."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import track
from rich.table import Table

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.errors import ExportError
from stochastic_depth.export.load import Description
from stochastic_depth.export.network import (
    elastic_network,
    measured,
    plain_network,
    shallower_network,
)
from stochastic_depth.export.truncate import Dropped
from stochastic_depth.export.write import SUFFIX, Format, write_export
from stochastic_depth.surgery.inspect import si
from stochastic_depth.train import reopen


@dataclass(frozen=True)
class Export:
    """A trained network as a plain file, p_l in its weights, read back and checked."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    format: Format = "safetensors"
    """safetensors, torch (torch.export, .pt2), or onnx; batches of any size."""
    depth: float = 1.0
    """The share of blocks to keep; those that validation needs least are taken out."""
    elastic: bool = False
    """Keep all blocks, note in which order they can be left out (predict --depth chooses), and
    measure what each depth errs and costs; safetensors only."""
    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where its data is now (none: where it was)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write (none: named as the run, in the current folder)."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Export, prog="stochastic-depth export", args=arguments)
    if not 0 < asked.depth <= 1:
        raise ExportError(f"--depth {asked.depth}: a share of the blocks, above 0 and at most 1")
    if asked.elastic and (asked.format != "safetensors" or asked.depth < 1):
        raise ExportError("--elastic keeps all blocks, in a safetensors file: no other options")
    console = PlainConsole()

    def watch(dropped: Iterator[Dropped], count: int) -> Iterator[Dropped]:
        evaluations = 0
        for each in track(
            dropped,
            "ordering blocks",
            count,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            evaluations += each.evaluations
            yield each
        console.print(
            f"{count} blocks ordered by validation loss, in {evaluations:,} evaluations",
        )

    run, images = reopen(asked.run, asked.data)
    if asked.elastic:
        plain = elastic_network(run, images, asked.checkpoint, watch)
        plain = measured(plain, images, run.execution)
        console.print(choices_table(plain.description))
    elif asked.depth < 1:
        plain = shallower_network(run, images, asked.checkpoint, asked.depth, watch)
    else:
        plain = plain_network(run, images, asked.checkpoint)
    path = asked.out or Path(run.path.name + SUFFIX[asked.format])
    difference = write_export(path, plain, asked.format)
    console.print(
        f"{path} ({path.stat().st_size:,} bytes): read back, outputs differ by "
        f"{difference:.1e} of the largest one",
        soft_wrap=True,
    )
    return 0


def choices_table(description: Description) -> Table:
    """What each depth errs and costs."""
    table = Table()
    columns = ("depth", "blocks", "validation", "test error", "parameters", "FLOPs", "ms/image")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for choice in description.choices:
        table.add_row(
            f"{choice.blocks / len(description.order):.2f}",
            str(choice.blocks),
            f"{choice.validation_error:.2f} %",
            f"{choice.test_error:.2f} %",
            si(choice.parameters),
            si(choice.flops),
            f"{1000 * choice.seconds:.3f}",
        )
    return table
