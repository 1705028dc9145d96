"""stochastic-depth analyze depth RUN..."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stochastic_depth.cli.analyze.options import NetworkAnalysis
from stochastic_depth.cli.analyze.output import print_plain, seeds_text, shown, spread_text
from stochastic_depth.lab.removed_depth import Curve, Order, Point, Settings, measured_curves
from stochastic_depth.lab.study import Spread, grouped
from stochastic_depth.lab.trained import found_path

ORDERS: tuple[Order, ...] = ("last", "least needed")


@dataclass(frozen=True)
class Depth(NetworkAnalysis):
    """Test error, parameters and time without the last, or the least needed, blocks."""

    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)

    def analyse(self, console: Console) -> None:
        kinds = grouped(self.opened())
        found: dict[str, list[Curve]] = {}
        for network in self.networks():
            with shown(console, network.run.path.name) as progress:
                found[network.run.id] = measured_curves(
                    network, self.settings, progress, self.again
                )
            print_plain(console, str(found_path(network.run, "depth")))
        of_kinds = {name: [found[run.id] for run in runs] for name, runs in kinds.items()}
        for order in ORDERS:
            console.print(depth_table(order, of_kinds))


def depth_table(order: Order, of_kinds: dict[str, list[list[Curve]]]) -> Table:
    """Test errors as trained and recalibrated; of one kind, also parameters and time."""
    alone = len(of_kinds) == 1
    runs = sorted({len(of_kind) for of_kind in of_kinds.values()})
    table = Table(
        title=Text(
            f"Test error, %, without the {order} blocks, {seeds_text(*runs)}\n"
            "as it is, and with the statistics of BatchNorm recalibrated"
        ),
        title_justify="left",
    )
    table.add_column("\nremoved", justify="right")
    if alone:
        table.add_column("\nparameters", justify="right")
        table.add_column("ms an\nimage", justify="right")
    for name in of_kinds:
        for variant in ("as it is", "recal."):
            table.add_column(Text(f"{name}\n{variant}"), justify="right")
    removed = sorted({p.removed for kind in of_kinds.values() for p in kind[0][0].points})
    for k in removed:
        row = [f"{k}"]
        for of_kind in of_kinds.values():
            plain, again = (
                _points(of_kind, order, recalibrated, k) for recalibrated in (False, True)
            )
            if alone:
                row.append(f"{_mean(plain, lambda p: p.parameters).mean:,.0f}")
                row.append(f"{_mean(plain, lambda p: 1000 * p.seconds_per_image).mean:.3g}")
            row += [
                spread_text(_mean(points, lambda p: p.error)) if points else ""
                for points in (plain, again)
            ]
        table.add_row(*row)
    return table


def _points(of_kind: list[list[Curve]], order: Order, recalibrated: bool, k: int) -> list[Point]:
    """Of every run of a kind, the point at which `k` blocks are removed."""
    return [
        point
        for curves in of_kind
        for curve in curves
        if (curve.order, curve.recalibrated) == (order, recalibrated)
        for point in curve.points
        if point.removed == k
    ]


def _mean(points: list[Point], figure: Callable[[Point], float]) -> Spread:
    return Spread.of([figure(point) for point in points])
