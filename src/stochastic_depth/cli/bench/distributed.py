"""stochastic-depth bench distributed."""

import os
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import Options
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.bench.distributed import DEPTHS, Sent, measure
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Distributed(Options):
    """What processes of this CPU send each other, and the time (gloo)."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes."""
    depth: int = 110
    """Of the CIFAR ResNet."""
    batch: int = 32
    """Images a step, of all processes."""
    size: int = 32
    """Height and width of the images, pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for ranks in self.ranks:
            if ranks < 2 or self.batch < 2 * ranks:
                raise ConfigError(
                    f"ranks={ranks}, batch={self.batch}: at least 2 processes, of 2 images each"
                )

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        threads = max(1, (os.cpu_count() or 1) // max(self.ranks))
        results: dict[str, Any] = {}
        for ranks in self.ranks:
            with console.status(f"{ranks} processes"):
                sent = measure(ranks, self.depth, self.batch, self.size, self.repeats, threads)
            console.print(self._table(ranks, sent))
            results[str(ranks)] = {
                way: {name: asdict(of_depth) for name, of_depth in of_way.items()}
                for way, of_way in sent.items()
            }
        console.print(
            f"each cell: constant depth, p_L = 0.5, and their ratio; float32, eager, {threads} "
            "thread(s) a process\nsent: by each process in a step; open: of the parameters, those "
            "in no closed block",
            highlight=False,
        )
        return {"threads": threads, "ranks": results}

    def _table(self, ranks: int, sent: dict[str, dict[str, Sent]]) -> Table:
        table = Table(title=f"ResNet-{self.depth}, {ranks} processes, {self.batch} images a step")
        for column in ("", "sent\nMiB", "collectives", "median\nms", "open"):
            table.add_column(column, justify="right" if column else "left")
        for way, of_way in sent.items():
            constant, stochastic = (of_way[name] for name in DEPTHS)
            pairs = [
                (constant.bytes / 2**20, stochastic.bytes / 2**20, "{:.2f}"),
                (constant.calls, stochastic.calls, "{:.0f}"),
                (*(1e3 * statistics.median(s.seconds) for s in (constant, stochastic)), "{:.0f}"),
            ]
            cells = [
                f"{form.format(before)} {form.format(after)}\n{after / before:.3f}"
                for before, after, form in pairs
            ]
            table.add_row(way, *cells, f"{stochastic.open_share:.3f}")
        return table
