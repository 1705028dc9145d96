"""Test error over p_L and depth: the paper's figure 8, right."""

import altair as alt

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.report.figure import Figure, Row
from stochastic_depth.report.figures.marks import chart, layered
from stochastic_depth.report.sources import Sweep
from stochastic_depth.report.style import HEAT
from stochastic_depth.report.wording import percent, seeds
from stochastic_depth.train import best_record

Cells = dict[tuple[int, float], list[float]]
"""Test errors of the seeds, by depth and p_L."""


def depth_sweep(sweep: Sweep) -> Figure | None:
    """A heat map of the finished runs; None when there are none. Constant depth is p_L = 1."""
    cells: Cells = {}
    rows: list[Row] = []
    for run in sweep.runs:
        if not (run.finished and run.records):
            continue
        config = run.run.config
        final = 1.0 if config.survival.rule == "constant" else config.survival.final
        error = best_record(list(run.records)).test_error
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
        sentence=_sentence(cells),
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
            # the three lighter of five steps carry dark text
            "dark": spread.mean > low + 0.55 * (high - low),
            "told": f"depth {depth}, p_L = {final:g}: {percent(spread)} "
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
        base.mark_rect(cornerRadius=2).encode(color=colour, description="told:N"),
        base.mark_text(fontSize=10, aria=False).encode(text="shown:N", color=text),
    )


def _sentence(cells: Cells) -> str:
    means = {cell: Spread.of(errors).mean for cell, errors in cells.items()}
    (depth, final), best = min(means.items(), key=lambda item: item[1])
    sentence = f"The lowest error, {best:.2f} %, is at depth {depth} and p_L = {final:g}"
    depths = sorted({d for d, _ in means})
    if len(depths) == 1:
        return f"{sentence}."
    told = []
    for d in (depths[0], depths[-1]):
        at = min((p for other, p in means if other == d), key=lambda p: means[d, p])
        told.append(f"{at:g} at depth {d}")
    return f"{sentence}; the best p_L is {' and '.join(told)}."
