"""A quantity against the epoch: each seed thin, the mean thick, learning-rate drops marked."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import altair as alt

from stochastic_depth.report.experiment import Experiment, Series
from stochastic_depth.report.figure import Row
from stochastic_depth.report.figures.marks import chart, colour, hover, keys, layered, log_axis
from stochastic_depth.report.style import LIGHT
from stochastic_depth.train import Record

POINTS = 200
"""As many points of a curve tell their number."""

Quantity = Callable[[Record], float]


def rows(experiment: Experiment, quantities: dict[str, Quantity]) -> list[Row]:
    """A row for each evaluation of each run."""
    return [
        {
            "series": series.name,
            "run": run.name,
            "seed": run.run.config.seed,
            "epoch": record.epoch,
            **{name: quantity(record) for name, quantity in quantities.items()},
        }
        for series in experiment.series
        for run in series.runs
        for record in run.records
    ]


def panel(
    experiment: Experiment,
    quantity: Quantity,
    title: str,
    unit: str,
    told: Callable[[float], str],
) -> alt.LayerChart:
    """`quantity` of every run on a logarithmic axis; what is not above zero is left out.

    Args:
        told: its text at a point.
    """

    def value(record: Record) -> float | None:
        measured = quantity(record)
        return measured if measured > 0 else None

    thin, thick, points = [], [], []
    for series in experiment.series:
        for run in series.runs:
            thin += [
                {"s": series.name, "run": str(run.run.path), "x": r.epoch, "y": value(r)}
                for r in run.records
            ]
        means = _means(series, quantity)
        thick += [{"s": series.name, "x": x, "y": y} for x, y, _ in means if y > 0]
        every = math.ceil(len(means) / POINTS)
        points += [
            {"s": series.name, "x": x, "y": y, "told": f"{series.name}, epoch {x:g}: {text}"}
            for x, y, text in ((x, y, _told(values, told)) for x, y, values in means[::-every])
            if y > 0
        ]
    x = alt.X("x:Q", title="epoch", axis=alt.Axis(tickCount=6, tickMinStep=1)).scale(
        domain=[0, max(row["x"] for row in thin)], nice=False
    )
    y = log_axis([row["y"] for row in thin], unit)
    base = {"x": x, "y": y, "color": colour(keys(experiment.series))}
    return layered(
        drops(experiment),
        chart(thin)
        .mark_line(strokeWidth=0.8, opacity=0.35, aria=False)
        .encode(detail="run:N", **base),
        chart(thick).mark_line(strokeWidth=2.4, aria=False).encode(**base),
        hover(points).encode(**base),
        title=title,
    )


def drops(experiment: Experiment) -> alt.Chart:
    """Where the learning rate is divided."""
    reached = max(run.records[-1].epoch for run in experiment.runs)
    values: list[dict[str, Any]] = [{"x": epoch} for epoch in experiment.drops if epoch <= reached]
    return (
        chart(values)
        .mark_rule(strokeDash=[2, 3], color=LIGHT["muted"], opacity=0.6, aria=False)
        .encode(x="x:Q")
    )


def _means(series: Series, quantity: Quantity) -> list[tuple[float, float, list[float]]]:
    """(epoch, mean, the values), as far as all runs of the series have come."""
    journals = [run.records for run in series.runs]
    return [
        (records[0].epoch, statistics.fmean(values), values)
        for records in zip(*journals, strict=False)
        for values in [[quantity(record) for record in records]]
    ]


def _told(values: list[float], told: Callable[[float], str]) -> str:
    mean = told(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean}, mean of {', '.join(map(told, sorted(values)))}"
