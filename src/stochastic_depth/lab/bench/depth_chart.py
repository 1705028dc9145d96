"""The figure of time and memory per image against depth, as `bench depth` measures them."""

import statistics
from collections.abc import Mapping
from typing import Any

import altair as alt

from stochastic_depth.lab.charts import Figure, Key, Row, chart, colour, layered
from stochastic_depth.lab.style import CONSTANT_COLOUR, STOCHASTIC
from stochastic_depth.lab.titles import CONSTANT
from stochastic_depth.timing import Timing

NAMES = {"constant": CONSTANT, "stochastic": "stochastic depth"}
LEGEND = (Key(NAMES["constant"], CONSTANT_COLOUR), Key(NAMES["stochastic"], STOCHASTIC[0]))


def depth_cost(result: Mapping[str, Any]) -> Figure:
    """The figure of the result of `bench depth`: medians, quartiles, peaks, and fitted lines."""
    time: list[Row] = []
    memory: list[Row] = []
    for kind in NAMES:
        for n, depth in enumerate(result["depths"]):
            timing = Timing(tuple(1e3 * s for s in result["seconds_per_image"][kind][n]))
            low, high = timing.quartiles
            peak = result["bytes_per_image"][kind][n] / 2**20
            time.append(
                {"s": NAMES[kind], "x": depth, "y": timing.median, "low": low, "high": high}
                | {"label": f"{NAMES[kind]}, {depth} layers: {timing.median:.3g} ms an image"}
            )
            memory.append(
                {"s": NAMES[kind], "x": depth, "y": peak}
                | {"label": f"{NAMES[kind]}, {depth} layers: {peak:.3g} MiB an image"}
            )
    rows: list[Row] = [
        {"kind": t["s"], "layers": t["x"], "milliseconds_per_image": t["y"]}
        | {"lower_quartile": t["low"], "upper_quartile": t["high"], "mebibytes_per_image": m["y"]}
        for t, m in zip(time, memory, strict=True)
    ]
    lines = result["lines"]
    return Figure(
        id="depth-cost",
        title="Time and memory against depth",
        sentence=_sentence(result),
        rows=rows,
        panels=(
            _panel(time, lines["seconds"], 1e3, "Time of a training step", "milliseconds an image"),
            _panel(memory, lines["memory"], 2**-20, "Peak memory", "MiB an image"),
        ),
        legend=LEGEND,
        note="Medians and quartiles; lines by least squares.",
    )


def _panel(
    values: list[Row], lines: Mapping[str, Any], unit: float, title: str, label: str
) -> alt.LayerChart:
    last = max(row["x"] for row in values)
    ends: list[Row] = [
        {"s": NAMES[kind], "x": x, "y": unit * (line["slope"] * x + line["intercept"])}
        for kind, line in lines.items()
        for x in (0, last)
    ]
    hue = colour(LEGEND)
    x, y = (
        alt.X("x:Q", title="layers", axis=alt.Axis(tickCount=5)),
        alt.Y("y:Q", title=label, scale=alt.Scale(nice=False)),
    )
    fitted = chart(ends).mark_line(strokeWidth=1.6, opacity=0.6, aria=False).encode(x, y, hue)
    points = chart(values).encode(x=x, color=hue)
    layers = [fitted]
    if "low" in values[0]:
        layers.append(points.mark_rule(aria=False).encode(y=alt.Y("low:Q"), y2="high:Q"))
    dots = points.mark_point(filled=True, opacity=1, size=46)
    return layered(*layers, dots.encode(y=y, description="label:N"), title=title)


def _sentence(result: Mapping[str, Any]) -> str:
    slopes = {kind: result["lines"]["seconds"][kind]["slope"] for kind in NAMES}
    deepest = result["depths"][-1]
    seconds = {kind: statistics.median(result["seconds_per_image"][kind][-1]) for kind in NAMES}
    saved = 1 - seconds["stochastic"] / seconds["constant"]
    clauses = " and ".join(f"{1e6 * slopes[kind]:.3g} µs with {NAMES[kind]}" for kind in NAMES)
    return (
        f"Each layer more costs {clauses} for an image; at {deepest} layers stochastic depth saves "
        f"{100 * saved:.1f} % of the time."
    )
