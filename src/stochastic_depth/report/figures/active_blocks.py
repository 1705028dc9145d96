"""How many blocks ran in a step, against the distribution that the gates should have."""

import math
from collections import Counter
from collections.abc import Sequence

import altair as alt
import torch

from stochastic_depth.analysis.active_blocks import active_distribution
from stochastic_depth.report.experiment import Series
from stochastic_depth.report.figure import Figure, Row
from stochastic_depth.report.figures.marks import chart, layered
from stochastic_depth.report.style import LIGHT
from stochastic_depth.report.wording import seeds


def active_blocks(series: Series) -> Figure | None:
    """Of stochastic depth; None when the journals do not tell, or gates are for single samples."""
    if series.survival.gate != "batch":
        return None
    counts: Counter[int] = Counter()
    for run in series.runs:
        for record in run.records:
            if record.epoch > series.survival.ramp_epochs:
                counts.update({int(n): count for n, count in record.active_counts.items()})
    if not counts.total():
        return None
    survival = torch.tensor(series.cost.survival, dtype=torch.float64)
    exact = active_distribution(survival).tolist()
    steps = counts.total()
    rows: list[Row] = [
        {
            "active_blocks": n,
            "steps": counts[n],
            "share_of_steps": counts[n] / steps,
            "probability": probability,
        }
        for n, probability in enumerate(exact)
    ]
    ramp = " Steps of the ramp are left out." if series.survival.ramp_epochs else ""
    return Figure(
        id="active-blocks",
        title="Active blocks in a step",
        sentence=_sentence(series, counts, exact),
        rows=rows,
        panels=(_panel(series, rows, steps),),
        note=f"Bars: {steps:,} training steps of {seeds(len(series.runs))} ({series.name}). Line: "
        f"the Poisson-binomial distribution, exact for these survival probabilities.{ramp}",
        height=210,
    )


def _panel(series: Series, rows: Sequence[Row], steps: int) -> alt.LayerChart:
    seen = [n for n, row in enumerate(rows) if row["steps"] or row["probability"] > 1e-4]
    shown = rows[max(0, min(seen) - 1) : max(seen) + 2]
    values: list[Row] = [
        {
            "x": row["active_blocks"],
            "share": 100 * row["share_of_steps"],
            "exact": 100 * row["probability"],
            "told": f"{row['active_blocks']} blocks: {row['steps']:,} steps, "
            f"{100 * row['share_of_steps']:.2f} %; expected "
            f"{steps * row['probability']:,.1f}",
        }
        for row in shown
    ]
    axis = alt.Axis(tickMinStep=1, labelAngle=0, labelOverlap="parity")
    base = chart(values).encode(x=alt.X("x:O", title="active blocks", axis=axis))
    return layered(
        base.mark_bar(color=series.colour, opacity=0.45, width={"band": 0.8}).encode(
            y=alt.Y("share:Q", title="percent of steps"), description="told:N"
        ),
        base.mark_line(color=LIGHT["ink"], strokeWidth=1.6, aria=False).encode(y="exact:Q"),
        base.mark_point(color=LIGHT["ink"], filled=True, opacity=1, size=14, aria=False).encode(
            y="exact:Q"
        ),
    )


def _sentence(series: Series, counts: Counter[int], exact: Sequence[float]) -> str:
    steps = counts.total()
    mean = sum(n * count for n, count in counts.items()) / steps
    expected = sum(series.cost.survival)
    error = math.sqrt(sum(p * (1 - p) for p in series.cost.survival) / steps)
    apart = abs(mean - expected) / error if error else 0.0
    distance = sum(abs(counts[n] / steps - p) for n, p in enumerate(exact)) / 2
    blocks = len(series.cost.survival)
    return (
        f"With {series.name}, on average {mean:.2f} of {blocks} blocks ran, where {expected:.2f} "
        f"are expected: {apart:.1f} standard errors away. The two distributions differ in "
        f"{100 * distance:.1f} % of the steps."
    )
