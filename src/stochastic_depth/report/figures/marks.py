"""What all figures are drawn with."""

import math
from collections.abc import Sequence

import altair as alt

from stochastic_depth.report.experiment import Series
from stochastic_depth.report.figure import Key, Row


def chart(values: Sequence[Row]) -> alt.Chart:
    """Of rows alone, without types to be guessed."""
    return alt.Chart(alt.InlineData(values=[dict(row) for row in values]))


def layered(*layers: alt.Chart, title: str = "") -> alt.LayerChart:
    """One panel, the first layer at the back."""
    return alt.LayerChart(layer=list(layers), title=title)


def hover(values: Sequence[Row]) -> alt.Chart:
    """Points that are seen when they are pointed at, each with its `told`."""
    points = chart(values).mark_point(filled=True, opacity=0, size=50)
    return points.encode(description="told:N")


def keys(series: Sequence[Series]) -> tuple[Key, ...]:
    """Of each series its colour."""
    return tuple(Key(one.name, one.colour) for one in series)


def colour(shown: Sequence[Key]) -> alt.Color:
    """Of the column `s`, with a legend."""
    scale = alt.Scale(domain=[key.name for key in shown], range=[key.colour for key in shown])
    legend = alt.Legend(symbolType="stroke", symbolOpacity=1, columns=2 if len(shown) > 3 else 0)
    return alt.Color("s:N", scale=scale, sort=None, legend=legend)


def dashes(shown: Sequence[Key], column: str = "s", legend: bool = False) -> alt.StrokeDash:
    """Of `column`."""
    scale = alt.Scale(domain=[key.name for key in shown], range=[list(key.dash) for key in shown])
    told = alt.Legend(symbolType="stroke", symbolOpacity=1) if legend else None
    return alt.StrokeDash(f"{column}:N", scale=scale, sort=None, legend=told)


def log_axis(values: Sequence[float | None], title: str) -> alt.Y:
    """The column `y` on a logarithmic axis, with a little room above and below `values`."""
    seen = [value for value in values if value is not None and value > 0] or [0.1, 1]
    room = max(max(seen) / min(seen), 1.5) ** 0.05
    low, high = min(seen) / room, max(seen) * room
    axis = alt.Axis(values=_ticks(low, high), format="~g")
    scale = alt.Scale(type="log", domain=[low, high], nice=False)
    return alt.Y("y:Q", title=title, axis=axis, scale=scale)


def _ticks(low: float, high: float) -> list[float]:
    """As many round numbers as can be read."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for mantissas in ((1,), (1, 3), (1, 2, 5), range(1, 10), [n / 10 for n in range(10, 100)]):
        ticks = [float(f"{m}e{decade}") for decade in decades for m in mantissas]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 4:
            break
    return inside[:: math.ceil(len(inside) / 8)]
