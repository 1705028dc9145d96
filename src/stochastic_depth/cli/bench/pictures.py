"""stochastic-depth bench pictures."""

import os
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import shown, timings
from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.bench.data import decoded, taken, write_tree
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train.config import ModelConfig, SurvivalConfig
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Pictures(Options):
    """How many pictures are decoded a second, and how many are needed."""

    repeats: int = 5
    """Rounds, each of one pass over the pictures with every number of workers."""
    engine: Literal["auto", "eager", "compiled", "graphs"] = "eager"
    """Of the training steps; there are no graphs of this network."""
    workers: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of processes that decode (0: this one)."""
    depth: int = 152
    """Of the ImageNet ResNet: 50, 101 or 152."""
    batch: int = 16
    """Pictures a step."""
    root: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of ImageNet (none: generated pictures of its size)."""
    pictures: int = 256
    """How many of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        batches = self.pictures // max(1, self.batch)
        if self.batch < 2 or not self.workers or not 0 <= max(self.workers) < batches:
            raise ConfigError(
                f"workers={self.workers}, batch={self.batch}, pictures={self.pictures}: each "
                "worker makes a batch of at least 2 before the clock starts, and some must be left"
            )

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        with ExitStack() as stack:
            root = self.root
            if root is None:
                root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                with console.status("writing pictures"):
                    write_tree(root, self.pictures)
            return self._measured(root, execution, console)

    def _measured(self, root: Path, execution: Execution, console: Console) -> dict[str, Any]:
        images = FolderBatches(
            root,
            batch=self.batch,
            seed=0,
            device=execution.device,
            workers=0,
            channels_last=True,
            train=self.pictures,
        )
        recipe = RECIPES["imagenet-resnet152"]()
        stochastic = replace(
            recipe,
            model=ModelConfig("imagenet-resnet", self.depth),
            optimizer=replace(recipe.optimizer, batch=self.batch),
        )
        configs = {
            "constant depth": replace(stochastic, survival=SurvivalConfig("constant")),
            "p_L = 0.5": stochastic,
        }
        rates = list(shown(decoded(images, self.workers, self.repeats), self.repeats, console))
        steps = shown(
            taken(configs, images, execution, self.repeats), self.repeats, console, "training"
        )
        takes = {name: self.batch / t.median for name, t in timings(list(steps)).items()}
        by_workers = dict(zip(self.workers, zip(*rates, strict=True), strict=True))
        cores = (
            execution.threads
            if not hasattr(os, "sched_getaffinity")
            else len(os.sched_getaffinity(0))
        )
        console.print(_table(by_workers, takes))
        console.print(
            f"{cores} core(s) for decoding and training; ResNet-{self.depth} takes "
            + ", ".join(f"{rate:,.1f} a second at {name}" for name, rate in takes.items()),
            highlight=False,
        )
        return {
            "cores": cores,
            "load": os.getloadavg()[0],
            "file_bytes": statistics.fmean(p.stat().st_size for p in root.glob("train/*/*")),
            "decoded_per_second": by_workers,
            "taken_per_second": takes,
        }


def _table(by_workers: dict[int, tuple[float, ...]], takes: dict[str, float]) -> Table:
    table = Table(title="decoded, cut and scaled to 224 x 224")
    for column in ("workers", "median\npictures/s", "quartiles\npictures/s"):
        table.add_column(column, justify="right")
    for name in takes:
        table.add_column(f"of what is taken\nat {name}", justify="right")
    for workers, rates in by_workers.items():
        low, median, high = statistics.quantiles(rates, n=4)
        table.add_row(
            str(workers),
            f"{median:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            *(f"{median / rate:,.1f} x" for rate in takes.values()),
        )
    return table
