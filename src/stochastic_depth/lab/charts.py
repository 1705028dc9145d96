"""A figure with its sentence and its data, and the charts that figures are made of."""

import csv
import io
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from stochastic_depth.lab.experiments import Experiment, Series
from stochastic_depth.lab.style import LIGHT
from stochastic_depth.plain_text import epoch_text
from stochastic_depth.train import Record

Row = Mapping[str, Any]
"""One observation: texts and numbers by column, None for a missing value."""
Panel = alt.Chart | alt.LayerChart


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    name: str
    colour: str
    dash: tuple[int, int] = (1, 0)
    """The lengths of strokes and of gaps, in pixels."""


@dataclass(frozen=True)
class Figure:
    """A figure. It is drawn from its rows alone, so that it can be checked against them."""

    id: str
    """A file name: lower-case letters, digits and hyphens."""
    title: str
    sentence: str
    """A sentence that says what it shows, with the numbers of this very data."""
    rows: Sequence[Row]
    panels: Sequence[Panel]
    """Drawn side by side if there is room, otherwise one below the other."""
    legend: Sequence[Key] = ()
    note: str = ""
    """How it was measured, and what is averaged."""
    height: int = 240
    """Height of the plot in each panel, in pixels."""
    axis: int = 58
    """The width of the labels to the left of the plot in each panel, in pixels."""

    def csv(self) -> str:
        """The rows as CSV, with a column for each of their keys."""
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in self.rows)
        return text.getvalue()


FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a formula begins in a spreadsheet."""


def _cell(value: Any) -> Any:
    """Prefix text that begins like a formula with an apostrophe, so that spreadsheets show it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def chart(values: Sequence[Row]) -> alt.Chart:
    """A chart of `values`; Vega-Lite does not have to guess their types."""
    return alt.Chart(alt.InlineData(values=[dict(row) for row in values]))


def layered(*layers: alt.Chart, title: str = "") -> alt.LayerChart:
    """One panel of several layers, the first layer at the back."""
    return alt.LayerChart(layer=list(layers), title=title)


def hover(values: Sequence[Row]) -> alt.Chart:
    """Points that appear under the pointer; the text of each is its `label`."""
    points = chart(values).mark_point(filled=True, opacity=0, size=50)
    return points.encode(description="label:N")


def at_epoch(what: str, epoch: float, value: str) -> str:
    """The label of a point: whose value it is, when, and the value."""
    return f"{what}, epoch {epoch_text(epoch)}: {value}"


def keys(series: Sequence[Series]) -> tuple[Key, ...]:
    """The colour of each series."""
    return tuple(Key(one.name, one.colour) for one in series)


def colour(shown: Sequence[Key]) -> alt.Color:
    """Colours by the column `s`, with a legend."""
    scale = alt.Scale(domain=[key.name for key in shown], range=[key.colour for key in shown])
    legend = alt.Legend(symbolType="stroke", symbolOpacity=1, columns=2 if len(shown) > 3 else 0)
    return alt.Color("s:N", scale=scale, sort=None, legend=legend)


def dashes(shown: Sequence[Key], column: str = "s", legend: bool = False) -> alt.StrokeDash:
    """Dashes by `column`."""
    scale = alt.Scale(domain=[key.name for key in shown], range=[list(key.dash) for key in shown])
    shown_legend = alt.Legend(symbolType="stroke", symbolOpacity=1) if legend else None
    return alt.StrokeDash(f"{column}:N", scale=scale, sort=None, legend=shown_legend)


def log_axis(values: Sequence[float | None], title: str) -> alt.Y:
    """The column `y` on a logarithmic axis, with a little room above and below `values`."""
    seen = [value for value in values if value is not None and value > 0] or [0.1, 1]
    decades = max(math.log10(max(seen)) - math.log10(min(seen)), math.log10(1.5))
    room = 10 ** (0.05 * decades)
    low, high = max(min(seen) / room, math.ulp(0.0)), min(max(seen) * room, sys.float_info.max)
    axis = alt.Axis(values=_ticks(low, high), format="~g")
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return alt.Y("y:Q", title=title, axis=axis, scale=scale)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between `low` and `high`, 8 at most.

    Over a wide range they are equal in each decade, over a narrow one their distances are equal.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        ticks = [float(f"{m}e{decade}") for decade in decades for m in mantissas]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            return inside[:: math.ceil(len(inside) / 8)]
    if high - low < sys.float_info.min:
        return [low]
    widest = math.ceil(math.log10(high - low))
    steps = [(m, exponent) for exponent in range(widest - 2, widest + 1) for m in (1, 2, 5)]
    return next(filter(lambda ticks: len(ticks) <= 8, (_multiples(*s, low, high) for s in steps)))


def _multiples(m: int, exponent: int, low: float, high: float) -> list[float]:
    """The multiples of m * 10^exponent from `low` to `high`."""
    step = float(f"{m}e{exponent}")
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [float(f"{m * n}e{exponent}") for n in numbers]


POINTS_OF_CURVE = 200
"""How many points of a curve, at most, show their value under the pointer."""

Quantity = Callable[[Record], float]


def curve_rows(experiment: Experiment, quantities: dict[str, Quantity]) -> list[Row]:
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


def curve_panel(
    experiment: Experiment,
    quantity: Quantity,
    title: str,
    unit: str,
    label: Callable[[float], str],
) -> alt.LayerChart:
    """`quantity` of every run on a logarithmic axis; values that are not above zero are left out.

    Args:
        label: returns the text of a value, which is shown under the pointer.
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
        every = math.ceil(len(means) / POINTS_OF_CURVE)
        points += [
            {"s": series.name, "x": x, "y": y, "label": at_epoch(series.name, x, text)}
            for x, y, text in ((x, y, _label(values, label)) for x, y, values in means[::-every])
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
    """Vertical lines where the learning rate is divided."""
    reached = max(run.records[-1].epoch for run in experiment.runs)
    values: list[dict[str, Any]] = [{"x": epoch} for epoch in experiment.drops if epoch <= reached]
    return (
        chart(values)
        .mark_rule(strokeDash=[2, 3], color=LIGHT["muted"], opacity=0.6, aria=False)
        .encode(x="x:Q")
    )


def _means(series: Series, quantity: Quantity) -> list[tuple[float, float, list[float]]]:
    """(epoch, mean, values), up to the epoch that all runs of the series have reached."""
    journals = [run.records for run in series.runs]
    return [
        (records[0].epoch, statistics.fmean(values), values)
        for records in zip(*journals, strict=False)
        for values in [[quantity(record) for record in records]]
    ]


def _label(values: list[float], label: Callable[[float], str]) -> str:
    mean = label(statistics.fmean(values))
    if len(values) == 1:
        return mean
    return f"{mean}, mean of {', '.join(map(label, sorted(values)))}"
