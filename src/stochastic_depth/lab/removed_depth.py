"""Can blocks be thrown away? A trained network without its last, or its least needed, blocks."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import altair as alt

from stochastic_depth.errors import ConfigError
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
from stochastic_depth.lab.formatting import duration, percent
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
from stochastic_depth.lab.study import Experiment, Series, Spread
from stochastic_depth.lab.style import LIGHT
from stochastic_depth.lab.trained import Progress, TrainedNetwork, read_found, write_found
from stochastic_depth.train.runtime import machine

Order = Literal["last", "least needed"]


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how many images."""

    points: int = 19
    """How many numbers of removed blocks, evenly from none to all."""
    choose_on: int = 500
    """Validation images, evenly spread over their part, by which the least needed are found."""
    recalibrate_on: int = 2000
    """Training images, as training sees them, that BatchNorm is recalibrated on: the first
    mini-batches of the first epoch, whole ones."""
    batch: int = 128
    """Images in a batch that is timed."""
    repeats: int = 5
    """Rounds of timing."""

    def __post_init__(self) -> None:
        for name, least in (
            ("points", 2),
            ("choose_on", 1),
            ("recalibrate_on", 2),
            ("batch", 1),
            ("repeats", 2),
        ):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ConfigError(f"{option}={getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True)
class Point:
    """A network that lost some of its blocks; the others keep their p_l."""

    removed: int
    blocks: list[int]
    """Which ones, from 0: their branches are gone, their shortcuts stay."""
    error: float
    """Percent of the test images."""
    validation_error: float
    parameters: int
    seconds_per_image: float
    """Median over the rounds, in batches."""


@dataclass(frozen=True)
class Curve:
    """Networks with fewer and fewer blocks."""

    order: Order
    recalibrated: bool
    """Whether BatchNorm's statistics were measured anew after the removal."""
    points: list[Point]


def measured_curves(
    network: TrainedNetwork, settings: Settings, progress: Progress, again: bool = False
) -> list[Curve]:
    """`curves`, written to the run's `analysis/depth.json`, or read where it was before.

    Args:
        again: measure again what was measured before.
    """
    what = {
        "checkpoint_step": network.step,
        "blocks": len(network.handle.blocks),
        "images": network.images.sizes["test"],
        "settings": asdict(settings),
        "machine": machine(network.run.execution),
    }

    def understood(found: dict[str, Any]) -> list[Curve]:
        return [
            Curve(**{**curve, "points": [Point(**point) for point in curve["points"]]})
            for curve in found["curves"]
        ]

    before = None if again else read_found(network.run, "depth", what, understood)
    if before is not None:
        return before
    measured = curves(network, settings, progress)
    write_found(network.run, "depth", {**what, "curves": [asdict(curve) for curve in measured]})
    return measured


def curves(network: TrainedNetwork, settings: Settings, progress: Progress) -> list[Curve]:
    """Both orders of removal, each as trained and with BatchNorm recalibrated."""
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
            statistics = recalibrated(network.model, training_images, network.run.execution)
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


ORDERS = {"last": "The last k blocks removed", "least needed": "The k least needed removed"}
BATCH_NORM = {
    False: Key("as trained", LIGHT["muted"]),
    True: Key("BatchNorm recalibrated", LIGHT["muted"], (4, 3)),
}


def removed_blocks(experiment: Experiment) -> Figure | None:
    """Of the runs whose networks were cut; None when none were."""
    rows: list[Row] = [row for series in experiment.series for row in _rows(series)]
    if not rows:
        return None
    shown = [s for s in experiment.series if any(row["series"] == s.name for row in rows)]
    orders = [order for order in ORDERS if any(row["order"] == order for row in rows)]
    return Figure(
        id="removed-blocks",
        title="Blocks thrown away after training",
        sentence=_sentence(shown, rows),
        rows=rows,
        panels=tuple(_panel(shown, rows, order) for order in orders),
        legend=(*keys(shown), *BATCH_NORM.values()),
        note="Which blocks are least needed is chosen on validation images. Solid: as trained. "
        "Dashed: the statistics of BatchNorm measured anew. Mean over seeds.",
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


def _panel(shown: list[Series], rows: list[Row], order: str) -> alt.LayerChart:
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
            "told": f"{series}, {removed} removed, {norm}: {percent(spread)}; "
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
            detail="norm:N", description="told:N"
        ),
        title=ORDERS[order],
    )


def _sentence(shown: list[Series], rows: list[Row]) -> str:
    """How many of the last blocks can go before 5 % of the accuracy is lost."""
    told = []
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
        told.append(f"{within} of the last blocks with {series.name} ({curve[0]:.2f} % whole)")
    if not told:
        return "Test error against the number of blocks removed."
    return f"95 % of the accuracy is left without {', '.join(told)}."


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)
