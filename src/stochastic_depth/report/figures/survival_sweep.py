"""Test error and training time against p_L at one depth: the paper's figure 8, left."""

from collections.abc import Callable

import altair as alt

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.report.experiment import Series
from stochastic_depth.report.figure import Figure, Key, Row
from stochastic_depth.report.figures.marks import chart, colour, layered, log_axis
from stochastic_depth.report.measures import error_at_best, training_seconds
from stochastic_depth.report.sources import Sweep, Trained
from stochastic_depth.report.style import CONSTANT, STOCHASTIC
from stochastic_depth.report.wording import duration, percent, plus_minus, seeds
from stochastic_depth.train import best_record

KEYS = {
    "linear": Key("linear decay", STOCHASTIC[0]),
    "uniform": Key("uniform", STOCHASTIC[1]),
    "constant": Key("constant depth", CONSTANT, (6, 3)),
}
"""By the name of the rule."""

Point = tuple[str, float, Series]
"""Rule, p_L, and the runs with these."""


def survival_sweep(sweep: Sweep) -> Figure | None:
    """Of the finished runs; None when there are none with stochastic depth."""
    points = _points(sweep)
    if not any(rule != "constant" for rule, _, _ in points):
        return None
    rows: list[Row] = [
        {
            "rule": rule,
            "p_L": final,
            "seed": run.run.config.seed,
            "run": run.name,
            "test_error": best_record(list(run.records)).test_error,
            "seconds": sum(record.seconds for record in run.records),
        }
        for rule, final, series in points
        for run in series.runs
    ]
    panels = (
        _panel(points, error_at_best, "Test error", "percent", percent),
        _panel(
            points,
            training_seconds,
            "Training time",
            "seconds",
            lambda spread: f"{plus_minus(spread)} s, {duration(spread.mean)}",
        ),
    )
    config = sweep.runs[0].run.config
    return Figure(
        id="survival-sweep",
        title="Test error and training time against p_L",
        sentence=_sentence(points),
        rows=rows,
        panels=panels,
        legend=_legend(points),
        note=f"Depth {config.model.depth}. Test error at the epoch of the best validation error. "
        "Points: mean over seeds; lines through them reach one standard deviation to each side. "
        "Only finished runs count.",
    )


def _points(sweep: Sweep) -> list[Point]:
    groups: dict[tuple[str, float], list[Trained]] = {}
    for run in sweep.runs:
        if run.finished and run.records:
            survival = run.run.config.survival
            final = 1.0 if survival.rule == "constant" else survival.final
            groups.setdefault((survival.rule, final), []).append(run)
    return [
        (rule, final, Series(rule, "", runs[0].run.config.survival, tuple(runs)))
        for (rule, final), runs in sorted(groups.items())
    ]


def _legend(points: list[Point]) -> list[Key]:
    return [key for rule, key in KEYS.items() if any(rule == at for at, _, _ in points)]


def _panel(
    points: list[Point],
    measure: Callable[[Series], Spread],
    title: str,
    unit: str,
    told: Callable[[Spread], str],
) -> alt.LayerChart:
    rows: list[Row] = []
    for rule, final, series in points:
        spread = measure(series)
        deviation = spread.deviation or 0.0
        where = "" if rule == "constant" else f", p_L = {final:g}"
        text = f"{KEYS[rule].name}{where}: {told(spread)} ({seeds(len(series.runs))})"
        low, high = spread.mean - deviation, spread.mean + deviation
        rows.append(
            {
                "s": KEYS[rule].name,
                "x": final,
                "y": spread.mean,
                "low": low,
                "high": high,
                "told": text,
            }
        )
    constant = [row for row in rows if row["s"] == KEYS["constant"].name]
    varied = [row for row in rows if row["s"] != KEYS["constant"].name]
    hue = colour(_legend(points))
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], format="~g")
    x = alt.X("x:Q", title="p_L, survival probability of the last block", axis=axis)
    x = x.scale(domain=[0, 1])
    y = _axis(rows, unit)
    line = chart(constant).encode(y=y, color=hue)
    band = chart(constant).mark_rect(opacity=0.12, aria=False)
    base = chart(varied).encode(x=x, y=y, color=hue)
    return layered(
        band.encode(y=alt.Y("low:Q"), y2="high:Q", color=hue),
        line.mark_rule(strokeDash=[6, 3], strokeWidth=1.6).encode(description="told:N"),
        base.mark_rule(strokeWidth=1.4, aria=False).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2, aria=False),
        base.mark_point(filled=True, opacity=1, size=42).encode(description="told:N"),
        title=title,
    )


def _axis(rows: list[Row], unit: str) -> alt.Y:
    """Logarithmic where errors differ by much, which leaves the small ones apart."""
    ends = [float(row[end]) for row in rows for end in ("low", "high")]
    if unit == "percent" and 0 < min(ends) < max(ends) / 10:
        return log_axis(ends, unit)
    return alt.Y("y:Q", title=unit).scale(zero=unit == "seconds", nice=False)


def _sentence(points: list[Point]) -> str:
    errors = {(rule, final): error_at_best(series) for rule, final, series in points}
    rules = [rule for rule in ("linear", "uniform") if any(r == rule for r, _ in errors)]
    told = []
    for rule in rules:
        best = min((final for r, final in errors if r == rule), key=lambda f: errors[rule, f].mean)
        told.append(
            f"{KEYS[rule].name} is best at p_L = {best:g} with {percent(errors[rule, best])}"
        )
    if ("constant", 1.0) in errors:
        told.append(f"constant depth has {percent(errors['constant', 1.0])}")
    sentence = "; ".join(told)
    return f"{sentence[0].upper()}{sentence[1:]}."
