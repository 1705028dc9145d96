"""stochastic-depth bench steady."""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import OfResNet
from stochastic_depth.cli.bench.output import shown
from stochastic_depth.lab.bench.steadiness import CONSTANT, Steady, steadiness
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class SteadyBench(OfResNet):
    """How even steps are in time and memory: independent and balanced gates, constant depth."""

    network: str = "cifar-resnet"
    """Of `depth` layers; or the name of a model of timm's (vit_small_patch16_224)."""
    final: float = 0.5
    """p_L of linear decay."""
    limit: int = 2**30
    """Bytes into which the largest batch has to fit."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        bench = Steady(
            self.network, self.depth, self.final, Workload(self.batch, self.size, 3, execution)
        )
        found = steadiness(list(shown(bench.rounds(self.repeats), self.repeats, console)))
        seconds = statistics.median(found[CONSTANT].seconds)
        kept = statistics.fmean(found[CONSTANT].kept)
        table = Table(title=f"{self.repeats} training steps, batch {self.batch}")
        for column in ("", "median", "spread", "mean bytes", "peak bytes", "peak/mean", "batch"):
            table.add_column(column, justify="right" if column else "left")
        rows: dict[str, Any] = {}
        for name, result in found.items():
            largest = result.largest_batch(self.batch, self.limit)
            rows[name] = {
                **asdict(result),
                "relative_median": statistics.median(result.seconds) / seconds,
                "spread": result.spread,
                "mean_kept": statistics.fmean(result.kept) / kept,
                "peak_kept": max(result.kept) / kept,
                "peak_over_mean": result.peak_over_mean,
                "largest_batch": largest,
            }
            table.add_row(
                name,
                f"{rows[name]['relative_median']:.3f}",
                f"{100 * result.spread:.1f} %",
                f"{rows[name]['mean_kept']:.3f}",
                f"{rows[name]['peak_kept']:.3f}",
                f"{result.peak_over_mean:.3f}",
                f"{largest:,}",
            )
        console.print(table)
        console.print(
            "median, bytes kept for backward: of constant depth's; spread: deviation over mean of "
            f"the\nseconds; batch: the largest that keeps at most {self.limit:,} bytes in any step",
            highlight=False,
        )
        return {"alternatives": rows}
