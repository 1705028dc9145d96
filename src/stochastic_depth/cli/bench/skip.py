"""stochastic-depth bench skip."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import OfResNet
from stochastic_depth.cli.bench.output import shown
from stochastic_depth.lab.bench.skipping import Skip, skippings
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class SkipBench(OfResNet):
    """Time against the share of FLOPs that was active."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        bench = Skip(self.depth, Workload(self.batch, self.size, 3, execution))
        rounds = list(shown(bench.rounds(self.repeats), self.repeats, console))
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
