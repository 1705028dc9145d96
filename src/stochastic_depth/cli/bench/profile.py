"""stochastic-depth bench profile."""

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from stochastic_depth.cli.bench.options import OfResNet
from stochastic_depth.cli.bench.output import shown
from stochastic_depth.lab.bench.engines import operators, pieces
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.runtime import Execution

SHOWN = 15
"""Operators in the table; the file has all."""


@dataclass(frozen=True)
class Profile(OfResNet):
    """Where the time of a step at constant depth goes."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        workload = Workload(self.batch, self.size, 3, execution)
        by_operator = operators(workload.step(CifarResNet(self.depth)), steps=3)
        console.print(self._operators(by_operator))
        result: dict[str, Any] = {"operators": by_operator}
        if execution.engine == "graphs":
            result["pieces"] = self._timed_pieces(workload, console)
        return result

    def _operators(self, seconds: dict[str, float]) -> Table:
        whole = sum(seconds.values())
        table = Table(title=f"ResNet-{self.depth} by autograd, {1e3 * whole:,.0f} ms a step")
        table.add_column("operator")
        for column in ("ms", "share"):
            table.add_column(column, justify="right")
        for name, of_operator in list(seconds.items())[:SHOWN]:
            table.add_row(name, f"{1e3 * of_operator:.2f}", f"{100 * of_operator / whole:.1f} %")
        return table

    def _timed_pieces(self, workload: Workload, console: Console) -> dict[str, Any]:
        timed, step = pieces(self.depth, workload)
        for _ in range(3):
            step()
        timed.seconds.clear()
        whole, inside = [], [0.0]
        for _ in shown(range(self.repeats), self.repeats, console):
            began = time.perf_counter()
            step()
            whole.append(time.perf_counter() - began)
            inside.append(sum(map(sum, timed.seconds.values())))
        between = [
            step - (after - before)
            for step, (before, after) in zip(whole, itertools.pairwise(inside), strict=True)
        ]
        kernels, step_ms = workload.execution.kernels, 1e3 * statistics.median(whole)
        title = f"ResNet-{self.depth} by block program, {kernels} kernels, {step_ms:,.0f} ms a step"
        table = Table(title=title)
        table.add_column("piece")
        for column in ("median, ms", "in a step"):
            table.add_column(column, justify="right")
        result = {}
        for name, seconds in timed.seconds.items():
            count = len(seconds) // self.repeats
            result[name] = {"count": count, "seconds": statistics.median(seconds)}
            table.add_row(name, f"{1e3 * result[name]['seconds']:.2f}", f"{count}")
        rest = statistics.median(between)
        table.add_row("cast, update, gates", f"{1e3 * rest:.2f}", "1")
        console.print(table)
        return {"step": statistics.median(whole), "rest": rest, **result}
