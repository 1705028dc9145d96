"""stochastic-depth export and predict: a trained network as a file, and its predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from stochastic_depth.choices import CheckpointName
from stochastic_depth.cli.arguments import Flag, parse, require_run
from stochastic_depth.cli.outputs import require_output
from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.train.checks import at_least, check_that
from stochastic_depth.train.layout import with_name

if TYPE_CHECKING:
    from rich.table import Table

    from stochastic_depth.export.description import Description


Format = Literal["safetensors", "torch", "onnx"]
SUFFIX: dict[Format, str] = {
    "safetensors": ".safetensors",
    "torch": ".pt2",
    "onnx": ".onnx",
}


@dataclass(frozen=True)
class Export:
    """Write a trained network to a plain file, p_l in its weights, and check it."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """The run folder."""
    format: Format | None = None
    """safetensors, torch (torch.export, .pt2), or onnx (none: as the end of --out says, or
    safetensors); all accept batches of any size."""
    depth: float = 1.0
    """The share of blocks to keep; those that validation needs least are removed."""
    elastic: Flag = False
    """Keep all blocks, store the order in which they can be left out (predict --depth chooses), and
    measure error and cost at each depth; for safetensors only."""
    checkpoint: CheckpointName = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where its data is now (none: where it was)."""
    device: str | None = None
    """Where blocks are chosen and measured (none: on the device the run began on)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """The file to write (none: in the current folder, named as the run and by --checkpoint last,
    --depth and --elastic)."""

    def check(self) -> None:
        _check_share(self.depth)
        form = self.chosen_format()
        if self.elastic and self.depth < 1:
            raise ConfigError(
                f"--elastic keeps all blocks, and --depth is {self.depth:g}: leave one out"
            )
        if self.elastic and form != "safetensors":
            asked = "--format" if self.format is not None else f"--out {self.out}"
            raise ConfigError(
                f"--elastic writes a safetensors file, and {asked} asks for {form}: leave "
                "--format out, and give --out a name that ends in .safetensors, or leave "
                "--elastic out"
            )

    def default_name(self) -> Path:
        """A file of its own for each network that a run can give, so that none replaces another."""
        name = with_name(self.run).name
        if self.checkpoint != "best":
            name += f"-{self.checkpoint}"
        if self.elastic:
            name += "-elastic"
        elif self.depth < 1:
            name += f"-depth-{self.depth:g}"
        return Path(name + SUFFIX[self.chosen_format()])

    def chosen_format(self) -> Format:
        """The format; if it is not given, that of the suffix of --out.

        Raises:
            ConfigError: when the suffix is that of another format, or of none.
        """
        if self.out is None:
            return self.format or "safetensors"
        formats: dict[str, Format] = {suffix: form for form, suffix in SUFFIX.items()}
        named = formats.get(self.out.suffix)
        if self.format is not None and named in (None, self.format):
            return self.format
        if named is None:
            raise ConfigError(
                f"--out {self.out} has no suffix of a format ({', '.join(SUFFIX.values())}): "
                "choose a name that has one, or give --format"
            )
        if self.format is not None:
            raise ConfigError(
                f"--out {self.out} is named as a file of the format {named}, and --format is "
                f"{self.format}: leave out --format, or choose a name that ends in "
                f"{SUFFIX[self.format]}"
            )
        return named


@dataclass(frozen=True)
class Predict:
    """Classify pictures with a trained network: classes and their probabilities."""

    network: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN_OR_FILE")]
    """A run folder, or a .safetensors or .onnx file that export wrote."""
    pictures: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE...", help_behavior_hint=""),
    ]
    """PNG, JPEG, WebP, BMP or PPM files of any size."""
    depth: float = 1.0
    """The share of blocks to run, for a file that was exported with --elastic."""
    top: int = 3
    """How many classes to show for each picture."""
    checkpoint: CheckpointName = "best"
    """For a run folder: the checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """For a run folder: where its data is now (none: where it was)."""

    def check(self) -> None:
        if not self.pictures:
            raise ConfigError("no IMAGE is given: name one picture or several")
        _check_share(self.depth)
        at_least(1, top=self.top)


def _check_share(depth: float) -> None:
    check_that(0 < depth <= 1, "--depth", depth, "above 0 and at most 1, a share")


def export(arguments: list[str]) -> int:
    asked = parse(Export, "export", arguments)
    require_run(asked.run)
    form = asked.chosen_format()
    path = asked.out or asked.default_name()
    require_output(path, form)
    require_output(path.with_name(path.name + ".json"), "description")
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        from stochastic_depth.export import network
        from stochastic_depth.export.write import write_export
        from stochastic_depth.train import reopen
    run, batches = reopen(asked.run, asked.data, asked.device)
    with console.progress(run.path.name) as progress:
        if asked.elastic:
            plain = network.elastic_network(run, batches, asked.checkpoint, progress)
            plain = network.measured(plain, batches, run.runtime, progress)
        elif asked.depth < 1:
            plain = network.shallower_network(run, batches, asked.checkpoint, asked.depth, progress)
        else:
            plain = network.plain_network(run, batches, asked.checkpoint)
    if asked.elastic:
        console.print(choices_table(plain.description))
    difference = write_export(path, plain, form)
    console.say(
        f"{path} ({path.stat().st_size:,} bytes): read back, outputs differ by "
        f"{difference:.1e} of the largest one"
    )
    return 0


def choices_table(description: "Description") -> "Table":
    """The table of error and cost at each depth."""
    from rich.table import Table

    from stochastic_depth.plain_text import si

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


def predict(arguments: list[str]) -> int:
    asked = parse(Predict, "predict", arguments)
    if asked.network.is_dir():
        require_run(asked.network)
    elif not asked.network.exists():
        raise RunError(f"{asked.network} does not exist: give a run folder, or an exported file")
    from stochastic_depth.cli.console import PlainConsole

    console = PlainConsole()
    with console.starting():
        import torch

        from stochastic_depth.export.predict import open_classifier, read_pictures
    network, description = open_classifier(asked.network, asked.depth, asked.checkpoint, asked.data)
    images = read_pictures(asked.pictures, description.input)
    with torch.inference_mode():
        probabilities = network(images).double().softmax(1)
    from rich.table import Table

    table = Table()
    table.add_column("picture", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    for path, row in zip(asked.pictures, probabilities, strict=True):
        best = row.topk(min(asked.top, len(row)))
        for rank, (p, label) in enumerate(zip(*(t.tolist() for t in best), strict=True)):
            name = str(path) if rank == 0 else ""
            table.add_row(name, description.classes[label], f"{100 * p:.2f} %")
        table.add_section()
    console.print(table)
    if choice := description.choice_at(asked.depth):
        console.print(
            f"{choice.blocks} of {len(description.order)} blocks: test error "
            f"{choice.test_error:.2f} %, {1000 * choice.seconds:.3f} ms an image, when exported",
        )
    return 0
