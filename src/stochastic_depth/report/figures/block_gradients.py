"""The gradient that reaches each residual block, at chosen epochs."""

from collections.abc import Sequence

import altair as alt

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.report.experiment import Experiment, Series
from stochastic_depth.report.figure import Figure, Row
from stochastic_depth.report.figures.marks import chart, colour, keys, layered, log_axis
from stochastic_depth.report.wording import seeds


def block_gradients(experiment: Experiment) -> Figure | None:
    """At the first, the middle and the last epoch; None when the journals hold no gradients."""
    rows: list[Row] = [
        {
            "series": series.name,
            "run": run.name,
            "seed": run.run.config.seed,
            "epoch": record.epoch,
            "block": block,
            "gradient": gradient,
        }
        for series in experiment.series
        for run in series.runs
        for record in run.records
        for block, gradient in enumerate(record.block_gradients, start=1)
    ]
    if not rows:
        return None
    epochs = _chosen(experiment)
    means = [
        spread.mean
        for epoch in epochs
        for series in experiment.series
        for _, spread in _gradients(series, epoch)
    ]
    y = log_axis(means, "mean absolute gradient")
    return Figure(
        id="block-gradients",
        title="Gradient strength over depth",
        sentence=_sentence(experiment, epochs[-1]),
        rows=[row for row in rows if row["epoch"] in epochs],
        panels=tuple(_panel(experiment, epoch, y) for epoch in epochs),
        legend=keys(experiment.series),
        note="Mean absolute gradient at the first convolution of each block, mean over seeds. Each "
        "is averaged over sampled steps in which the block was open: those it skipped, with a "
        "gradient of zero, are not counted.",
        height=200,
    )


def _chosen(experiment: Experiment) -> list[float]:
    """Epochs that every run has reached."""
    journals = [
        {record.epoch for record in run.records if record.block_gradients}
        for run in experiment.runs
    ]
    reached = sorted(set.intersection(*(epochs for epochs in journals if epochs)))
    return sorted({reached[0], reached[len(reached) // 2], reached[-1]}) if reached else []


def _gradients(series: Series, epoch: float) -> list[tuple[int, Spread]]:
    """(block, mean over the seeds in which it was open)."""
    seen: Sequence[Sequence[float | None]] = [
        record.block_gradients
        for run in series.runs
        for record in run.records
        if record.epoch == epoch and record.block_gradients
    ]
    blocks = [[value for value in values if value] for values in zip(*seen, strict=True)]
    return [(block, Spread.of(values)) for block, values in enumerate(blocks, start=1) if values]


def _panel(experiment: Experiment, epoch: float, y: alt.Y) -> alt.LayerChart:
    values: list[Row] = [
        {
            "s": series.name,
            "x": block,
            "y": spread.mean,
            "told": f"{series.name}, block {block}, epoch {epoch:g}: {spread.mean:.3g}",
        }
        for series in experiment.series
        for block, spread in _gradients(series, epoch)
    ]
    base = chart(values).encode(
        x=alt.X("x:Q", title="block", axis=alt.Axis(tickCount=6, tickMinStep=1)).scale(nice=False),
        y=y,
        color=colour(keys(experiment.series)),
    )
    return layered(
        base.mark_line(strokeWidth=1.6, aria=False),
        base.mark_point(filled=True, opacity=1, size=14).encode(description="told:N"),
        title=f"Epoch {epoch:g}",
    )


def _sentence(experiment: Experiment, epoch: float) -> str:
    told = []
    for series in experiment.series:
        gradients = _gradients(series, epoch)
        if len(gradients) > 1:
            (first, at_first), (last, at_last) = gradients[0], gradients[-1]
            told.append(
                f"{at_last.mean / at_first.mean:.2g} times as strong at block {last} as at block "
                f"{first} with {series.name} ({seeds(len(series.runs))})"
            )
    return f"At epoch {epoch:g} the gradient is {'; '.join(told)}."
