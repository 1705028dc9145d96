"""Test error and cost of a training step by gating."""

from collections.abc import Mapping
from typing import Any

import altair as alt

from stochastic_depth.lab.charts import Figure, Key, Row, chart, colour, layered
from stochastic_depth.lab.formatting import percent, seeds
from stochastic_depth.lab.study import Spread
from stochastic_depth.lab.style import CONSTANT, STOCHASTIC

ERROR = Key("test error: a seed each, mean and deviation", CONSTANT)
TIME, PEAK = Key("time of a step", STOCHASTIC[0]), Key("peak memory of a step", STOCHASTIC[1])


def gates_figure(result: Mapping[str, Any]) -> Figure:
    """The figure of the results of `gating_results`."""
    gatings = result["gatings"]
    rows: list[Row] = [
        {"gating": name, "seed": number, "test_error": error, **row["relative"]}
        for name, row in gatings.items()
        for number, error in enumerate(row["test_errors"])
    ]
    return Figure(
        id="gates-sweep",
        title=f"Ways of gating: {result['title']}",
        sentence=_sentence(gatings),
        rows=rows,
        panels=(_errors(gatings), _costs(gatings)),
        legend=(ERROR, TIME, PEAK),
        note=f"p_L = {result['p_L']:g}. Left: every seed, the mean, and one deviation to each "
        "side. Right: as shares of constant depth's; memory is what is kept for the backward pass.",
        height=28 * len(gatings),
        axis=110,
    )


def _gatings(gatings: Mapping[str, Any]) -> alt.Y:
    return alt.Y("gating:N", sort=list(gatings), title=None, axis=alt.Axis(grid=True))


def _errors(gatings: Mapping[str, Any]) -> alt.LayerChart:
    points: list[Row] = []
    means: list[Row] = []
    for name, row in gatings.items():
        spread = Spread.of(row["test_errors"])
        deviation = spread.deviation or 0.0
        points += [{"s": ERROR.name, "gating": name, "x": error} for error in row["test_errors"]]
        means.append(
            {
                "s": ERROR.name,
                "gating": name,
                "x": spread.mean,
                "low": spread.mean - deviation,
                "high": spread.mean + deviation,
                "label": f"{name}: {percent(spread)} ({seeds(len(row['test_errors']))})",
            }
        )
    y, hue = _gatings(gatings), colour((ERROR, TIME, PEAK))
    x = alt.X("x:Q", title="percent", scale=alt.Scale(zero=False))
    base = chart(means).encode(y=y, color=hue)
    return layered(
        base.mark_rule(strokeWidth=1.4, aria=False).encode(
            x=alt.X("low:Q", title="percent", scale=alt.Scale(zero=False)), x2="high:Q"
        ),
        chart(points).mark_point(opacity=0.5, size=24, aria=False).encode(x=x, y=y, color=hue),
        base.mark_point(filled=True, opacity=1, size=60).encode(x=x, description="label:N"),
        title="Test error",
    )


def _costs(gatings: Mapping[str, Any]) -> alt.LayerChart:
    values: list[Row] = [
        {
            "s": key.name,
            "gating": name,
            "x": row["relative"][which],
            "label": f"{name}: {key.name} {row['relative'][which]:.3f} of constant depth's",
        }
        for name, row in gatings.items()
        for key, which in ((TIME, "seconds"), (PEAK, "peak_kept"))
    ]
    x = alt.X("x:Q", title="of constant depth's", scale=alt.Scale(zero=False))
    return layered(
        chart(values)
        .mark_point(filled=True, opacity=1, size=60)
        .encode(x=x, y=_gatings(gatings), color=colour((ERROR, TIME, PEAK)), description="label:N"),
        title="Cost of a training step",
    )


def _sentence(gatings: Mapping[str, Any]) -> str:
    """The best gating, constant depth, and one coin a batch against one a sample."""
    errors = {name: Spread.of(row["test_errors"]) for name, row in gatings.items()}
    best = min(errors, key=lambda name: errors[name].mean)
    clauses = [f"The lowest error has {best}, {percent(errors[best])}"]
    if best != "constant" and "constant" in errors:
        clauses.append(f"constant depth has {percent(errors['constant'])}")
    pair = [f"{name} {percent(errors[name])}" for name in ("batch", "sample") if name in errors]
    if len(pair) == 2:
        clauses.append(f"one coin for all samples or for each: {' and '.join(pair)}")
    if any(spread.deviation is None for spread in errors.values()):
        clauses.append("of one seed there is no telling whether that is chance")
    return f"{'; '.join(clauses)}."
