"""The figures of sweeps: test error over p_L, over p_L and depth, and by gating.

Test error over p_L and depth is the paper's figure 8.
"""

from collections.abc import Callable, Mapping

import altair as alt

from stochastic_depth.lab.charts import Figure, Key, Row, chart, colour, layered, log_axis
from stochastic_depth.lab.experiments import Series, experiments
from stochastic_depth.lab.formatting import duration, percent, plus_minus, seeds, timing_note
from stochastic_depth.lab.outcomes import RunOutcome, Spread
from stochastic_depth.lab.recorded import RecordedSweep
from stochastic_depth.lab.style import CONSTANT_COLOUR, HEAT, STOCHASTIC
from stochastic_depth.lab.titles import CONSTANT

KEYS = {
    "linear": Key("linear decay", STOCHASTIC[0]),
    "uniform": Key("uniform", STOCHASTIC[1]),
    "constant": Key(CONSTANT, CONSTANT_COLOUR, (6, 3)),
}
"""Legend keys, by the name of the rule."""

Place = tuple[str, float, Series]
"""A rule, p_L, and the runs that have them."""


def survival_sweep(sweep: RecordedSweep) -> Figure | None:
    """The figure of the finished runs; None if none of them has stochastic depth."""
    points = _points(sweep)
    if not any(rule != "constant" for rule, _, _ in points):
        return None
    rows: list[Row] = [
        {
            "rule": rule,
            "p_L": final,
            "seed": run.run.config.seed,
            "run": run.name,
            "test_error": found.test_error_best,
            "seconds": found.seconds,
        }
        for rule, final, series in points
        for run in series.runs
        for found in [RunOutcome.of(run.records)]
    ]
    panels = (
        _survival_panel(
            points, lambda s: s.outcome.test_error_best, "Test error", "percent", percent
        ),
        _survival_panel(
            points,
            lambda s: s.outcome.seconds,
            "Training time",
            "seconds",
            lambda spread: f"{plus_minus(spread)} s, {duration(spread.mean)}",
        ),
    )
    config = sweep.runs[0].run.config
    return Figure(
        id="survival-sweep",
        title="Test error and training time against p_L",
        sentence=_survival_sentence(points),
        rows=rows,
        panels=panels,
        legend=_legend(points),
        note=f"Depth {config.model.depth}. Test error at the epoch of the best validation error. "
        "Points: mean over seeds; lines through them reach one standard deviation to each side. "
        f"Only finished runs count. {timing_note(sweep.finished())}".rstrip(),
    )


def _points(sweep: RecordedSweep) -> list[Place]:
    all_series = (s for experiment in experiments(sweep.finished()) for s in experiment.series)
    points = ((s.survival.rule, 1.0 if s.constant else s.survival.final, s) for s in all_series)
    return sorted(points, key=lambda point: point[:2])


def _legend(points: list[Place]) -> list[Key]:
    return [key for rule, key in KEYS.items() if any(rule == at for at, _, _ in points)]


def _survival_panel(
    points: list[Place],
    measure: Callable[[Series], Spread],
    title: str,
    unit: str,
    label: Callable[[Spread], str],
) -> alt.LayerChart:
    rows: list[Row] = []
    for rule, final, series in points:
        spread = measure(series)
        deviation = spread.deviation or 0.0
        where = "" if rule == "constant" else f", p_L = {final:g}"
        text = f"{KEYS[rule].name}{where}: {label(spread)} ({seeds(len(series.runs))})"
        low, high = spread.mean - deviation, spread.mean + deviation
        rows.append(
            {
                "s": KEYS[rule].name,
                "x": final,
                "y": spread.mean,
                "low": low,
                "high": high,
                "label": text,
            }
        )
    constant = [row for row in rows if row["s"] == KEYS["constant"].name]
    varied = [row for row in rows if row["s"] != KEYS["constant"].name]
    hue = colour(_legend(points))
    axis = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], format="~g")
    x = alt.X("x:Q", title="p_L, survival probability of the last block", axis=axis)
    x = x.scale(domain=[0, 1])
    y = _survival_axis(rows, unit)
    line = chart(constant).encode(y=y, color=hue)
    band = chart(constant).mark_rect(opacity=0.12, aria=False)
    base = chart(varied).encode(x=x, y=y, color=hue)
    return layered(
        band.encode(y=alt.Y("low:Q"), y2="high:Q", color=hue),
        line.mark_rule(strokeDash=[6, 3], strokeWidth=1.6).encode(description="label:N"),
        base.mark_rule(strokeWidth=1.4, aria=False).encode(y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_line(strokeWidth=2, aria=False),
        base.mark_point(filled=True, opacity=1, size=42).encode(description="label:N"),
        title=title,
    )


def _survival_axis(rows: list[Row], unit: str) -> alt.Y:
    """A logarithmic axis where errors differ by much, so that small ones can be told apart."""
    ends = [float(row[end]) for row in rows for end in ("low", "high")]
    if unit == "percent" and 0 < min(ends) < max(ends) / 10:
        return log_axis(ends, unit)
    return alt.Y("y:Q", title=unit).scale(zero=unit == "seconds", nice=False)


def _survival_sentence(points: list[Place]) -> str:
    errors = {(rule, final): series.outcome.test_error_best for rule, final, series in points}
    rules = [rule for rule in ("linear", "uniform") if any(r == rule for r, _ in errors)]
    clauses = []
    for rule in rules:
        best = min((final for r, final in errors if r == rule), key=lambda f: errors[rule, f].mean)
        clauses.append(
            f"{KEYS[rule].name} is best at p_L = {best:g} with {percent(errors[rule, best])}"
        )
    if ("constant", 1.0) in errors:
        clauses.append(f"constant depth has {percent(errors['constant', 1.0])}")
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


Cells = dict[tuple[int, float], list[float]]
"""The test errors of all seeds, by depth and p_L."""


def depth_sweep(sweep: RecordedSweep) -> Figure | None:
    """A heat map of the finished runs; None if there are none. Constant depth has p_L = 1."""
    cells: Cells = {}
    rows: list[Row] = []
    for run in sweep.finished():
        config = run.run.config
        final = 1.0 if config.survival.rule == "constant" else config.survival.final
        error = RunOutcome.of(run.records).test_error_best
        cells.setdefault((config.model.depth, final), []).append(error)
        rows.append(
            {
                "depth": config.model.depth,
                "p_L": final,
                "seed": config.seed,
                "run": run.name,
                "test_error": error,
            }
        )
    if not cells:
        return None
    return Figure(
        id="depth-sweep",
        title="Test error over p_L and depth",
        sentence=_depth_sentence(cells),
        rows=rows,
        panels=(_heat_map(cells),),
        note="Mean over seeds, percent, at the epoch of the best validation error; p_L = 1 is "
        "constant depth. Only finished runs count.",
        height=34 * len({depth for depth, _ in cells}),
    )


def _heat_map(cells: Cells) -> alt.LayerChart:
    means = {cell: Spread.of(errors) for cell, errors in cells.items()}
    low, high = min(s.mean for s in means.values()), max(s.mean for s in means.values())
    values: list[Row] = [
        {
            "depth": depth,
            "p": final,
            "error": spread.mean,
            "shown": f"{spread.mean:.{1 if high >= 10 else 2}f}",
            # The three lighter of the five colours carry dark text.
            "dark": spread.mean > low + 0.55 * (high - low),
            "label": f"depth {depth}, p_L = {final:g}: {percent(spread)} "
            f"({seeds(len(cells[depth, final]))})",
        }
        for (depth, final), spread in means.items()
    ]
    base = chart(values).encode(
        x=alt.X(
            "p:O", title="p_L", axis=alt.Axis(labelAngle=0, format="~g", domain=False, ticks=False)
        ),
        y=alt.Y("depth:O", title="layers", sort="descending"),
    )
    colour = alt.Color(
        "error:Q", scale=alt.Scale(range=list(HEAT), domain=[low, high]), legend=None
    )
    text = alt.condition("datum.dark", alt.value("#fffffe"), alt.value("#1c2025"))
    return layered(
        base.mark_rect(cornerRadius=2).encode(color=colour, description="label:N"),
        base.mark_text(fontSize=10, aria=False).encode(text="shown:N", color=text),
    )


def _depth_sentence(cells: Cells) -> str:
    means = {cell: Spread.of(errors).mean for cell, errors in cells.items()}
    (depth, final), best = min(means.items(), key=lambda item: item[1])
    sentence = f"The lowest error, {best:.2f} %, is at depth {depth} and p_L = {final:g}"
    depths = sorted({d for d, _ in means})
    if len(depths) == 1:
        return f"{sentence}."
    clauses = []
    for d in (depths[0], depths[-1]):
        at = min((p for other, p in means if other == d), key=lambda p: means[d, p])
        clauses.append(f"{at:g} at depth {d}")
    return f"{sentence}; the best p_L is {' and '.join(clauses)}."


ERROR = Key("a seed each, mean and deviation", CONSTANT_COLOUR)


def gates_sweep(sweep: RecordedSweep) -> Figure | None:
    """The test errors of the finished runs, by gating; None if there are none."""
    config = sweep.sweep.config
    points = sweep.sweep.grid.points()
    names = {point.of(config).survival: str(point.gating) for point in points}
    errors: dict[str, list[float]] = {name: [] for name in names.values()}
    rows: list[Row] = []
    for run in sweep.finished():
        gating = names[run.run.config.survival]
        error = RunOutcome.of(run.records).test_error_best
        errors[gating].append(error)
        rows.append(
            {
                "gating": gating,
                "seed": run.run.config.seed,
                "run": run.name,
                "test_error": error,
            }
        )
    if not rows:
        return None
    errors = {name: of_name for name, of_name in errors.items() if of_name}
    return Figure(
        id="gates-sweep",
        title="Test error by way of gating",
        sentence=_gating_sentence(errors),
        rows=rows,
        panels=(_gating_errors(errors),),
        legend=(ERROR,),
        note=f"p_L = {sweep.sweep.grid.survival[0]:g}. Test error at the epoch of the best "
        "validation error. Only finished runs count.",
        height=28 * len(errors),
        axis=110,
    )


def _gating_errors(errors: Mapping[str, list[float]]) -> alt.LayerChart:
    points: list[Row] = []
    means: list[Row] = []
    for name, of_name in errors.items():
        spread = Spread.of(of_name)
        deviation = spread.deviation or 0.0
        points += [{"s": ERROR.name, "gating": name, "x": error} for error in of_name]
        means.append(
            {
                "s": ERROR.name,
                "gating": name,
                "x": spread.mean,
                "low": spread.mean - deviation,
                "high": spread.mean + deviation,
                "label": f"{name}: {percent(spread)} ({seeds(len(of_name))})",
            }
        )
    y = alt.Y("gating:N", sort=list(errors), title=None, axis=alt.Axis(grid=True))
    x = alt.X("x:Q", title="percent", scale=alt.Scale(zero=False))
    low = alt.X("low:Q", title="percent", scale=alt.Scale(zero=False))
    hue = colour((ERROR,))
    base = chart(means).encode(y=y, color=hue)
    return layered(
        base.mark_rule(strokeWidth=1.4, aria=False).encode(x=low, x2="high:Q"),
        chart(points).mark_point(opacity=0.5, size=24, aria=False).encode(x=x, y=y, color=hue),
        base.mark_point(filled=True, opacity=1, size=60).encode(x=x, description="label:N"),
    )


def _gating_sentence(errors: Mapping[str, list[float]]) -> str:
    """The best gating, constant depth, and one coin a batch against one a sample."""
    spreads = {name: Spread.of(of_name) for name, of_name in errors.items()}
    best = min(spreads, key=lambda name: spreads[name].mean)
    clauses = [f"Lowest error: {best}, {percent(spreads[best])}"]
    if best != "constant" and "constant" in spreads:
        clauses.append(f"constant depth has {percent(spreads['constant'])}")
    pair = [f"{name} {percent(spreads[name])}" for name in ("batch", "sample") if name in spreads]
    if len(pair) == 2:
        clauses.append(f"one coin for all samples or for each: {' and '.join(pair)}")
    if any(spread.deviation is None for spread in spreads.values()):
        clauses.append("where there is one seed, this may be chance")
    return f"{'; '.join(clauses)}."
