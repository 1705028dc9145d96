"""The figure of the implicit ensemble."""

import statistics
from typing import Any

import altair as alt

from stochastic_depth.lab.charts import Figure, Key, Row, chart, colour, dashes, layered
from stochastic_depth.lab.ensemble import NAMES
from stochastic_depth.lab.experiments import Series
from stochastic_depth.lab.formatting import plus_minus, seeds
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.lab.style import CONSTANT_COLOUR, STOCHASTIC

METRICS = {
    "error": ("Test error", "percent", 1.0),
    "nll": ("Negative log-likelihood", "nats", 1.0),
    "ece": ("Calibration error", "percent", 100.0),
}
"""Title and unit of each metric, and the number by which its value in the file is multiplied."""


PREDICTORS = {
    "mean": Key(NAMES["mean"], STOCHASTIC[0]),
    "scaled": Key(NAMES["scaled"], STOCHASTIC[1]),
    "single": Key(NAMES["single"], STOCHASTIC[2], (6, 3)),
    "unscaled": Key(NAMES["unscaled"], CONSTANT_COLOUR, (2, 2)),
}


def ensemble_figure(series: Series) -> Figure | None:
    """The figure of the runs whose subnetworks were evaluated; None without any."""
    found = [(run, run.analysis("ensemble")) for run in series.runs]
    rows: list[Row] = [
        {"run": run.name, "seed": run.run.config.seed, **predictor}
        for run, content in found
        if content
        for predictor in content["predictors"]
    ]
    if not rows:
        return None
    runs = len({row["run"] for row in rows})
    content = next(content for _, content in found if content)
    return Figure(
        id="ensemble",
        title="The implicit ensemble",
        sentence=_sentence(rows),
        rows=rows,
        panels=tuple(_panel(rows, measure, runs) for measure in METRICS),
        legend=tuple(PREDICTORS.values()),
        note=f"{content['images']:,} test images, {content['subnetworks']} sampled subnetworks, "
        f"mean over {seeds(runs)} of training ({series.name}). Calibration error is the expected "
        "one (ECE): how far confidence is from accuracy.",
        height=200,
    )


def _panel(rows: list[Row], measure: str, runs: int) -> alt.LayerChart:
    title, unit, factor = METRICS[measure]
    points: list[dict[str, Any]] = []
    for name, members in sorted({(str(row["name"]), row["members"]) for row in rows}):
        values = [factor * v for v in _values(rows, name, members, measure)]
        spread = Spread.of(values)
        label = PREDICTORS[name].name.replace("M", str(members))
        points.append(
            {
                "s": PREDICTORS[name].name,
                "members": members,
                "y": spread.mean,
                "label": f"{label}: {plus_minus(spread, 3)} {unit}",
            }
        )
    means = [point for point in points if point["s"] == PREDICTORS["mean"].name]
    lines = [point for point in points if point["s"] != PREDICTORS["mean"].name]
    shown = list(PREDICTORS.values())
    hue = colour(shown)
    x = alt.X("members:Q", title="M, networks averaged").scale(type="log", base=2, nice=False)
    x = x.axis(values=[point["members"] for point in means], format="~g")
    y = alt.Y("y:Q", title=unit).scale(zero=False, nice=False)
    curve = chart(means).encode(x=x, y=y, color=hue)
    return layered(
        chart(lines)
        .mark_rule(strokeWidth=1.8)
        .encode(
            y=y,
            color=hue,
            strokeDash=dashes(shown),
            description="label:N",
        ),
        curve.mark_line(strokeWidth=2.2, aria=False),
        curve.mark_point(filled=True, opacity=1, size=36).encode(description="label:N"),
        title=title,
    )


def _values(rows: list[Row], name: str, members: int, measure: str) -> list[float]:
    return [row[measure] for row in rows if (row["name"], row["members"]) == (name, members)]


def _sentence(rows: list[Row]) -> str:
    most = max(row["members"] for row in rows if row["name"] == "mean")

    def mean(name: str, members: int, measure: str) -> float:
        return statistics.fmean(_values(rows, name, members, measure))

    only = {str(row["name"]): row["members"] for row in rows if row["name"] != "mean"}
    clauses = [
        f"{words} has {mean(name, members, 'error'):.2f} % error and "
        f"{mean(name, members, 'nll'):.3f} nats"
        for name, members, words in (
            ("scaled", only.get("scaled", 1), "the full network scaled by p_l"),
            ("mean", most, f"the mean of {most} sampled networks"),
            ("single", only.get("single", 1), "one sampled network"),
        )
    ]
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."
