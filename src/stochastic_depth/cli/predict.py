"""stochastic-depth predict RUN_OR_FILE IMAGE..."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.table import Table
from rich.text import Text

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.export.predict import open_classifier, read_pictures


@dataclass(frozen=True)
class Predict:
    """What a trained network sees in pictures: classes and their probabilities."""

    network: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_FILE")]
    """A run folder, or a .safetensors or .onnx file that export wrote."""
    pictures: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE")]
    """PNG, JPEG, WebP, BMP or PPM files of any size."""
    depth: float = 1.0
    """The share of blocks to run, of a file exported with --elastic."""
    top: int = 3
    """How many classes to tell for each picture."""
    checkpoint: Literal["best", "last"] = "best"
    """Of a run: the checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Of a run: where its data is now (none: where it was)."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Predict, prog="stochastic-depth predict", args=arguments)
    network, description = open_classifier(asked.network, asked.depth, asked.checkpoint, asked.data)
    images = read_pictures(asked.pictures, description.input)
    with torch.inference_mode():
        probabilities = network(images).double().softmax(1)
    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for path, row in zip(asked.pictures, probabilities, strict=True):
        best = row.topk(max(1, min(asked.top, len(row))))
        for rank, (p, label) in enumerate(zip(*(t.tolist() for t in best), strict=True)):
            name = Text(str(path) if rank == 0 else "")
            table.add_row(name, Text(description.classes[label]), f"{100 * p:.2f} %")
        table.add_section()
    console = PlainConsole()
    console.print(table)
    if choice := description.choice_at(asked.depth):
        console.print(
            f"{choice.blocks} of {len(description.order)} blocks: test error "
            f"{choice.test_error:.2f} %, {1000 * choice.seconds:.3f} ms an image, when exported",
        )
    return 0
