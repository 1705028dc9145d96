"""Can blocks be thrown away? A trained network without its last, or its least needed, blocks."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import altair as alt
from rich.table import Table

from stochastic_depth.export.depths import Progress
from stochastic_depth.lab.charts import (
    Figure,
    Key,
    Row,
    chart,
    colour,
    dashes,
    keys,
    layered,
    log_axis,
)
from stochastic_depth.lab.formatting import duration, percent, plus_minus, runs_text
from stochastic_depth.lab.options import RemovedDepthOptions
from stochastic_depth.lab.outcomes import Experiment, Series, Spread
from stochastic_depth.lab.pruning import (
    Pruned,
    Removed,
    as_pruned,
    errors,
    parameters_without,
    pruning_order,
    recalibrated,
    seconds_per_image,
)
from stochastic_depth.lab.sources import TrainedNetwork, read_analysis, write_analysis
from stochastic_depth.lab.style import LIGHT
from stochastic_depth.train.runtime import machine

Order = Literal["last", "least needed"]


@dataclass(frozen=True)
class Point:
    """A network without some of its blocks; the others keep their p_l."""

    removed: int
    blocks: list[int]
    """The numbers of the removed blocks, from 0. Their branches are removed and their shortcuts
    stay."""
    error: float
    """The test error in percent."""
    validation_error: float
    parameters: int
    seconds_per_image: float
    """The median over rounds, measured on a batch."""


@dataclass(frozen=True)
class Curve:
    """The same network with fewer and fewer blocks."""

    order: Order
    recalibrated: bool
    """Whether the BatchNorm statistics were measured again after the removal."""
    points: list[Point]


def measured_curves(
    network: TrainedNetwork, settings: RemovedDepthOptions, progress: Progress, again: bool = False
) -> list[Curve]:
    """The result of `curves`, read from the run's `analysis/depth.json` or written there.

    Args:
        again: whether to measure again what was measured before.
    """
    what = {
        "checkpoint_step": network.step,
        "blocks": len(network.handle.blocks),
        "images": network.images.sizes["test"],
        "settings": asdict(settings),
        "machine": machine(network.run.runtime),
    }

    def parse(found: dict[str, Any]) -> list[Curve]:
        return [
            Curve(**{**curve, "points": [Point(**point) for point in curve["points"]]})
            for curve in found["curves"]
        ]

    before = None if again else read_analysis(network.run, "depth", what, parse)
    if before is not None:
        return before
    measured = curves(network, settings, progress)
    write_analysis(network.run, "depth", {**what, "curves": [asdict(curve) for curve in measured]})
    return measured


def curves(
    network: TrainedNetwork, settings: RemovedDepthOptions, progress: Progress
) -> list[Curve]:
    """Both orders of removal, each as trained and with recalibrated BatchNorm statistics."""
    blocks, images = len(network.handle.blocks), network.images
    orders: dict[Order, list[int]] = {
        "last": list(range(blocks))[::-1],
        "least needed": pruning_order(network, settings.choose_on, progress),
    }
    counts = sorted({round(i * blocks / (settings.points - 1)) for i in range(settings.points)})
    removals = {tuple(sorted(order[:k])): None for order in orders.values() for k in counts}
    mini_batches = -(-settings.recalibrate_on // network.run.config.optimizer.batch)
    training_images = list(islice(images.train(0), mini_batches))
    pruned: dict[tuple[Removed, bool], Pruned] = {}
    for done, removed in enumerate(removals):
        progress("recalibrating", done, len(removals))
        plain = Pruned(removed, None)
        pruned[removed, False] = plain
        with as_pruned(network, plain):
            statistics = recalibrated(network.model, training_images, network.run.runtime)
        pruned[removed, True] = Pruned(removed, statistics)
    of_test = errors(network, pruned.values(), "test", progress)
    of_validation = errors(network, pruned.values(), "validation", progress)
    measured = dict(zip(pruned, zip(of_test, of_validation, strict=True), strict=True))
    seconds = seconds_per_image(network, list(removals), settings.batch, settings.repeats, progress)

    def point(order: Sequence[int], k: int, is_recalibrated: bool) -> Point:
        removed = tuple(sorted(order[:k]))
        test, validation = measured[removed, is_recalibrated]
        left = parameters_without(network, removed)
        return Point(k, list(removed), test, validation, left, seconds[removed])

    return [
        Curve(name, is_recalibrated, [point(order, k, is_recalibrated) for k in counts])
        for name, order in orders.items()
        for is_recalibrated in (False, True)
    ]


ORDERS: dict[Order, str] = {
    "last": "The last k blocks removed",
    "least needed": "The k least needed removed",
}
BATCH_NORM = {
    False: Key("as trained", LIGHT["muted"]),
    True: Key("BatchNorm recalibrated", LIGHT["muted"], (4, 3)),
}


def removed_blocks(experiment: Experiment) -> Figure | None:
    """The figure of the runs whose networks were measured without blocks; None without any."""
    rows: list[Row] = [row for series in experiment.series for row in _rows(series)]
    if not rows:
        return None
    shown = [s for s in experiment.series if any(row["series"] == s.name for row in rows)]
    orders: list[Order] = [order for order in ORDERS if any(row["order"] == order for row in rows)]
    return Figure(
        id="removed-blocks",
        title="Blocks thrown away after training",
        sentence=_sentence(shown, rows),
        rows=rows,
        panels=tuple(_panel(shown, rows, order) for order in orders),
        legend=(*keys(shown), *BATCH_NORM.values()),
        note="Which blocks are least needed is chosen on validation images. Solid: as trained. "
        "Dashed: the statistics of BatchNorm measured again. Mean over seeds.",
    )


def _rows(series: Series) -> list[Row]:
    return [
        {
            "series": series.name,
            "run": run.name,
            "order": curve["order"],
            "recalibrated": BATCH_NORM[curve["recalibrated"]].name,
            "removed": point["removed"],
            "blocks": " ".join(map(str, point["blocks"])),
            **{
                k: point[k]
                for k in ("error", "validation_error", "parameters", "seconds_per_image")
            },
        }
        for run in series.runs
        for content in [run.analysis("depth")]
        if content
        for curve in content["curves"]
        for point in curve["points"]
    ]


def _panel(shown: list[Series], rows: list[Row], order: Order) -> alt.LayerChart:
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["order"] == order:
            key = (row["series"], row["recalibrated"], row["removed"])
            cells.setdefault(key, []).append(row)
    values: list[Row] = [
        {
            "s": series,
            "norm": norm,
            "x": removed,
            "y": spread.mean,
            "label": f"{series}, {removed} removed, {norm}: {percent(spread)}; "
            f"{members[0]['parameters']:,} parameters, "
            f"{duration(_mean(members, 'seconds_per_image'))} an image",
        }
        for (series, norm, removed), members in cells.items()
        for spread in [Spread.of([row["error"] for row in members])]
    ]
    base = chart(values).encode(
        x=alt.X("x:Q", title="blocks removed, k", axis=alt.Axis(tickMinStep=1, tickCount=6)),
        y=log_axis([row["error"] for row in rows], "test error, percent"),
        color=colour(keys(shown)),
    )
    dash = dashes(list(BATCH_NORM.values()), "norm", legend=True)
    return layered(
        base.mark_line(strokeWidth=1.8, aria=False).encode(strokeDash=dash),
        base.mark_point(filled=True, opacity=1, size=20).encode(
            detail="norm:N", description="label:N"
        ),
        title=ORDERS[order],
    )


def _sentence(shown: list[Series], rows: list[Row]) -> str:
    """Says how many of the last blocks can be removed before 5 % of the accuracy is lost."""
    clauses = []
    for series in shown:
        curve = {
            removed: _mean(
                [
                    row
                    for row in rows
                    if (row["series"], row["order"], row["recalibrated"], row["removed"])
                    == (series.name, "last", BATCH_NORM[False].name, removed)
                ],
                "error",
            )
            for removed in sorted(
                {
                    row["removed"]
                    for row in rows
                    if row["series"] == series.name and row["order"] == "last"
                }
            )
        }
        if 0 not in curve:
            continue
        most = 100 - 0.95 * (100 - curve[0])
        spoilt = [k for k, error in curve.items() if error > most]
        within = max(k for k in curve if not spoilt or k < spoilt[0])
        clauses.append(f"{within} of the last blocks with {series.name} ({curve[0]:.2f} % whole)")
    if not clauses:
        return "Test error against the number of blocks removed."
    return f"95 % of the accuracy is left without {', '.join(clauses)}."


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)


def depth_table(order: Order, of_kinds: dict[str, list[list[Curve]]]) -> Table:
    """Test errors as trained and recalibrated; for a single kind, parameters and times too."""
    alone = len(of_kinds) == 1
    runs = sorted({len(of_kind) for of_kind in of_kinds.values()})
    table = Table(
        title=(
            f"Test error, %, without the {order} blocks, {runs_text(*runs)}\n"
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
            table.add_column(f"{name}\n{variant}", justify="right")
    removed = sorted({p.removed for kind in of_kinds.values() for p in kind[0][0].points})
    for k in removed:
        row = [f"{k}"]
        for of_kind in of_kinds.values():
            plain, again = (
                _points_at(of_kind, order, recalibrated, k) for recalibrated in (False, True)
            )
            if alone:
                row.append(f"{_spread(plain, lambda p: p.parameters).mean:,.0f}")
                row.append(f"{_spread(plain, lambda p: 1000 * p.seconds_per_image).mean:.3g}")
            row += [
                plus_minus(_spread(points, lambda p: p.error)) if points else ""
                for points in (plain, again)
            ]
        table.add_row(*row)
    return table


def _points_at(of_kind: list[list[Curve]], order: Order, recalibrated: bool, k: int) -> list[Point]:
    """The point at which `k` blocks are removed, for every run of a kind."""
    return [
        point
        for curves in of_kind
        for curve in curves
        if (curve.order, curve.recalibrated) == (order, recalibrated)
        for point in curve.points
        if point.removed == k
    ]


def _spread(points: list[Point], figure: Callable[[Point], float]) -> Spread:
    return Spread.of([figure(point) for point in points])
