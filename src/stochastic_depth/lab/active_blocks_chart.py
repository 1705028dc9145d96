"""The figures of active blocks and of drop rates."""

from collections.abc import Sequence

import altair as alt

from stochastic_depth.lab.active_blocks import ActiveBlocks, active_blocks
from stochastic_depth.lab.charts import Figure, Row, at_epoch, chart, colour, keys, layered
from stochastic_depth.lab.experiments import Experiment, Series
from stochastic_depth.lab.formatting import seeds
from stochastic_depth.lab.style import LIGHT


def active_blocks_figure(series: Series) -> Figure | None:
    """The figure of a series; None if its journals lack counts, or gates are for single samples."""
    if series.survival.gate != "batch":
        return None
    found = active_blocks(series.runs)
    steps = sum(found.counts)
    if not steps:
        return None
    rows: list[Row] = [
        {
            "active_blocks": n,
            "steps": count,
            "share_of_steps": count / steps,
            "probability": probability,
        }
        for n, (count, probability) in enumerate(zip(found.counts, found.expected, strict=True))
    ]
    return Figure(
        id="active-blocks",
        title="Active blocks in a step",
        sentence=_sentence(series, found),
        rows=rows,
        panels=(_panel(series, rows, steps),),
        note=f"Bars: {steps:,} training steps of {seeds(len(series.runs))} ({series.name}). Line: "
        "the exact distribution for these survival probabilities (under a schedule, its mean over "
        "the steps).",
        height=210,
    )


def drop_rates_figure(experiment: Experiment) -> Figure | None:
    """The mean drop rate over time; None if no run of `experiment` follows a schedule."""
    scheduled = [s for s in experiment.stochastic if s.survival.schedule.kind != "none"]
    if not scheduled:
        return None
    rows: list[Row] = [
        {
            "series": series.name,
            "epoch": record.epoch,
            "drop_rate": 1 - record.expected_active_blocks / blocks,
        }
        for series in scheduled
        for blocks in [len(series.cost.survival)]
        for record in series.runs[0].records
    ]
    values: list[Row] = [
        {
            "s": row["series"],
            "x": row["epoch"],
            "y": row["drop_rate"],
            "label": at_epoch(row["series"], row["epoch"], f"{100 * row['drop_rate']:.1f} %"),
        }
        for row in rows
    ]
    x = alt.X("x:Q", title="epoch", axis=alt.Axis(tickCount=6, tickMinStep=1)).scale(nice=False)
    y = alt.Y("y:Q", title="mean of 1 - p_l", axis=alt.Axis(format="%", tickCount=5))
    drawn = chart(values).mark_line(point=True, strokeWidth=2)
    kinds = {s.name: s.survival.schedule.kind for s in scheduled}
    named = " and ".join(
        name if kind in name else f"{name} ({kind})" for name, kind in kinds.items()
    )
    return Figure(
        id="drop-rates",
        title="Drop rate over time",
        sentence=f"The drop rates follow a schedule in {named}.",
        rows=rows,
        panels=(layered(drawn.encode(x, y, colour(keys(scheduled)), description="label:N")),),
        legend=keys(scheduled),
        note="The mean over all blocks, and over the steps of each interval.",
        height=180,
    )


def _panel(series: Series, rows: Sequence[Row], steps: int) -> alt.LayerChart:
    seen = [n for n, row in enumerate(rows) if row["steps"] or row["probability"] > 1e-4]
    shown = rows[max(0, min(seen) - 1) : max(seen) + 2]
    values: list[Row] = [
        {
            "x": row["active_blocks"],
            "share": 100 * row["share_of_steps"],
            "exact": 100 * row["probability"],
            "label": f"{row['active_blocks']} blocks: {row['steps']:,} steps, "
            f"{100 * row['share_of_steps']:.2f} %; expected "
            f"{steps * row['probability']:,.1f}",
        }
        for row in shown
    ]
    axis = alt.Axis(tickMinStep=1, labelAngle=0, labelOverlap="parity")
    base = chart(values).encode(x=alt.X("x:O", title="active blocks", axis=axis))
    return layered(
        base.mark_bar(color=series.colour, opacity=0.45, width={"band": 0.8}).encode(
            y=alt.Y("share:Q", title="percent of steps"), description="label:N"
        ),
        base.mark_line(color=LIGHT["ink"], strokeWidth=1.6, aria=False).encode(y="exact:Q"),
        base.mark_point(color=LIGHT["ink"], filled=True, opacity=1, size=14, aria=False).encode(
            y="exact:Q"
        ),
    )


def _sentence(series: Series, found: ActiveBlocks) -> str:
    (drawn, _), (expected, _) = found.moments()
    steps = sum(found.counts)
    pairs = zip(found.counts, found.expected, strict=True)
    distance = sum(abs(count / steps - chance) for count, chance in pairs) / 2
    return (
        f"With {series.name}, on average {drawn:.2f} of {len(found.counts) - 1} blocks ran, where "
        f"{expected:.2f} are expected. The two distributions differ in {100 * distance:.1f} % of "
        f"the steps; a chi-square test that the one follows the other has p = "
        f"{found.p_value():.2g}."
    )
