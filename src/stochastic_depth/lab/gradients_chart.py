"""The figures of gradient strength, over training and over depth."""

import statistics

import altair as alt

from stochastic_depth.lab.charts import (
    Figure,
    Row,
    at_epoch,
    chart,
    colour,
    curve_panel,
    curve_rows,
    keys,
    layered,
    log_axis,
)
from stochastic_depth.lab.experiments import Experiment, Series
from stochastic_depth.lab.formatting import seeds
from stochastic_depth.lab.gradients import block_means
from stochastic_depth.plain_text import epoch_text


def gradient_strength(experiment: Experiment) -> Figure:
    """The gradient of every run of an experiment against the epoch."""
    panel = curve_panel(
        experiment,
        lambda record: record.gradient_mean,
        "",
        "mean absolute gradient",
        lambda gradient: f"{gradient:.3g}",
    )
    return Figure(
        id="gradient-strength",
        title="Gradient strength at the first convolution",
        sentence=_strength_sentence(experiment.comparable()),
        rows=curve_rows(experiment, {"gradient_mean": lambda record: record.gradient_mean}),
        panels=(panel,),
        legend=keys(experiment.series),
        note="Mean absolute gradient of the weights of the first convolution, which no gate skips, "
        "averaged over all steps between two evaluations. Thin: each seed. Thick: their mean. "
        "Dotted: the learning rate is divided.",
    )


def _strength_sentence(experiment: Experiment) -> str:
    if experiment.constant is None:
        clauses = ", ".join(f"{s.name} {_mean_strength(s):.3g}" for s in experiment.series)
        return f"Averaged over training: {clauses}."
    base = _mean_strength(experiment.constant)
    clauses = ", ".join(
        f"the gradient with {s.name} is {_mean_strength(s) / base:.2f} times that with constant "
        "depth"
        for s in experiment.stochastic
    )
    return f"Averaged over training, {clauses or f'the gradient is {base:.3g}'}."


def _mean_strength(series: Series) -> float:
    """The geometric mean over training and seeds, which suits ratios and a logarithmic axis."""
    values = [r.gradient_mean for run in series.runs for r in run.records if r.gradient_mean > 0]
    return statistics.geometric_mean(values) if values else 0.0


def block_gradients(experiment: Experiment) -> Figure | None:
    """The gradients of blocks at the first, the middle and the last epoch that have any.

    None where the runs have no such epoch in common.
    """
    epochs = _chosen_epochs(experiment)
    if not epochs:
        return None
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
        if record.epoch in epochs
        for block, gradient in enumerate(record.block_gradients, start=1)
    ]
    shown = [_of_blocks(series, epoch) for epoch in epochs for series in experiment.series]
    y = log_axis([mean for of_blocks in shown for _, mean in of_blocks], "mean absolute gradient")
    return Figure(
        id="block-gradients",
        title="Gradient strength over depth",
        sentence=_blocks_sentence(experiment, epochs[-1]),
        rows=rows,
        panels=tuple(_blocks_panel(experiment, epoch, y) for epoch in epochs),
        legend=keys(experiment.series),
        note="Mean absolute gradient at the first convolution of each block, mean over seeds. Each "
        "is averaged over sampled steps in which the block was open: those it skipped, with a "
        "gradient of zero, are not counted.",
        height=200,
    )


def _chosen_epochs(experiment: Experiment) -> list[float]:
    """Epochs in which every run has a gradient that can be drawn, if it has any at all."""
    journals = [
        {record.epoch for record in run.records if any(record.block_gradients)}
        for run in experiment.runs
    ]
    reached = sorted(set.intersection(*(filter(None, journals)))) if any(journals) else []
    return sorted({reached[0], reached[len(reached) // 2], reached[-1]}) if reached else []


def _of_blocks(series: Series, epoch: float) -> list[tuple[int, float]]:
    """(block, mean over the seeds in which it was open); zero has no place on the axis."""
    records = [r for run in series.runs for r in run.records if r.epoch == epoch]
    return [(block, mean) for block, mean in enumerate(block_means(records), start=1) if mean]


def _blocks_panel(experiment: Experiment, epoch: float, y: alt.Y) -> alt.LayerChart:
    values: list[Row] = [
        {
            "s": series.name,
            "x": block,
            "y": mean,
            "label": at_epoch(f"{series.name}, block {block}", epoch, f"{mean:.3g}"),
        }
        for series in experiment.series
        for block, mean in _of_blocks(series, epoch)
    ]
    base = chart(values).encode(
        x=alt.X("x:Q", title="block", axis=alt.Axis(tickCount=6, tickMinStep=1)).scale(nice=False),
        y=y,
        color=colour(keys(experiment.series)),
    )
    return layered(
        base.mark_line(strokeWidth=1.6, aria=False),
        base.mark_point(filled=True, opacity=1, size=14).encode(description="label:N"),
        title=f"Epoch {epoch_text(epoch)}",
    )


def _blocks_sentence(experiment: Experiment, epoch: float) -> str:
    clauses = []
    for series in experiment.series:
        gradients = _of_blocks(series, epoch)
        if len(gradients) > 1:
            (first, at_first), (last, at_last) = gradients[0], gradients[-1]
            clauses.append(
                f"{at_last / at_first:.2g} times as strong at block {last} as at block "
                f"{first} with {series.name} ({seeds(len(series.runs))})"
            )
    if not clauses:
        return f"At epoch {epoch_text(epoch)} fewer than two blocks have a gradient."
    return f"At epoch {epoch_text(epoch)} the gradient is {'; '.join(clauses)}."
