"""Gradient strength over training and over depth (the paper, section 5 and figure 7)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import altair as alt
from rich.table import Table

from stochastic_depth.errors import RunError
from stochastic_depth.lab.charts import (
    Figure,
    Row,
    chart,
    colour,
    curve_panel,
    curve_rows,
    keys,
    layered,
    log_axis,
)
from stochastic_depth.lab.formatting import seeds
from stochastic_depth.lab.outcomes import Experiment, Series, Spread
from stochastic_depth.train import Record, Run


@dataclass(frozen=True)
class Gradients:
    """Mean absolute gradients, epoch by epoch, of runs that differ only in their seed."""

    first: list[Spread]
    """At the first convolution: the mean over the steps before each epoch ends, spread over the
    seeds."""
    blocks: list[list[float | None]]
    """[epochs][L]: at the first convolution of each block, the mean over the sampled steps in which
    it was open, and over the seeds. None where no seed has a value; [] where the journals are
    older."""


def gradients(runs: Sequence[Run], epochs: Sequence[float]) -> Gradients:
    """The gradients in the journals of `runs` at these epochs.

    Raises:
        RunError: when a run has not reached one of them.
    """
    at = [[record_at(run, epoch) for run in runs] for epoch in epochs]
    return Gradients(
        [Spread.of([record.gradient_mean for record in records]) for records in at],
        [_blocks(records) for records in at],
    )


def record_at(run: Run, epoch: float) -> Record:
    """The record of the interval in which `epoch` ends.

    Raises:
        RunError: when the run has not reached it.
    """
    records = run.records()
    for record in records:
        if record.epoch >= epoch - 1e-9:
            return record
    done = records[-1].epoch if records else 0
    raise RunError(f"{run.path} has reached epoch {done:g}, not {epoch:g}: choose other --epochs")


def spread_epochs(runs: Sequence[Run], count: int = 5) -> list[float]:
    """The first epoch that all `runs` have, the last one, and others evenly between them.

    Raises:
        RunError: when a run has no record yet.
    """
    journals = [run.records() for run in runs]
    for run, records in zip(runs, journals, strict=True):
        if not records:
            raise RunError(f"{run.path} has measured nothing yet: its journal is empty")
    shortest = min(journals, key=lambda records: records[-1].epoch)
    last = len(shortest) - 1
    places = {round(i * last / max(1, count - 1)) for i in range(count)}
    return [shortest[place].epoch for place in sorted(places)]


def _blocks(records: Sequence[Record]) -> list[float | None]:
    if not all(record.block_gradients for record in records):
        return []
    of_blocks = zip(*(record.block_gradients for record in records), strict=True)
    known = ([value for value in values if value is not None] for values in of_blocks)
    return [statistics.fmean(values) if values else None for values in known]


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
        sentence=_strength_sentence(experiment.settled()),
        rows=curve_rows(experiment, {"gradient_mean": lambda record: record.gradient_mean}),
        panels=(panel,),
        legend=keys(experiment.series),
        note="Mean absolute gradient of the weights of the first convolution, which no gate skips, "
        "averaged over all steps of an epoch. Thin: each seed. Thick: their mean. Dotted: the "
        "learning rate is divided.",
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
    """The gradients of blocks at the first, the middle and the last epoch; None without any."""
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
    epochs = _chosen_epochs(experiment)
    means = [
        spread.mean
        for epoch in epochs
        for series in experiment.series
        for _, spread in _of_blocks(series, epoch)
    ]
    y = log_axis(means, "mean absolute gradient")
    return Figure(
        id="block-gradients",
        title="Gradient strength over depth",
        sentence=_blocks_sentence(experiment, epochs[-1]),
        rows=[row for row in rows if row["epoch"] in epochs],
        panels=tuple(_blocks_panel(experiment, epoch, y) for epoch in epochs),
        legend=keys(experiment.series),
        note="Mean absolute gradient at the first convolution of each block, mean over seeds. Each "
        "is averaged over sampled steps in which the block was open: those it skipped, with a "
        "gradient of zero, are not counted.",
        height=200,
    )


def _chosen_epochs(experiment: Experiment) -> list[float]:
    """Epochs that every run has reached."""
    journals = [
        {record.epoch for record in run.records if record.block_gradients}
        for run in experiment.runs
    ]
    reached = sorted(set.intersection(*(epochs for epochs in journals if epochs)))
    return sorted({reached[0], reached[len(reached) // 2], reached[-1]}) if reached else []


def _of_blocks(series: Series, epoch: float) -> list[tuple[int, Spread]]:
    """(block, mean over the seeds in which it was open)."""
    seen: Sequence[Sequence[float | None]] = [
        record.block_gradients
        for run in series.runs
        for record in run.records
        if record.epoch == epoch and record.block_gradients
    ]
    blocks = [[value for value in values if value] for values in zip(*seen, strict=True)]
    return [(block, Spread.of(values)) for block, values in enumerate(blocks, start=1) if values]


def _blocks_panel(experiment: Experiment, epoch: float, y: alt.Y) -> alt.LayerChart:
    values: list[Row] = [
        {
            "s": series.name,
            "x": block,
            "y": spread.mean,
            "label": f"{series.name}, block {block}, epoch {epoch:g}: {spread.mean:.3g}",
        }
        for series in experiment.series
        for block, spread in _of_blocks(series, epoch)
    ]
    base = chart(values).encode(
        x=alt.X("x:Q", title="block", axis=alt.Axis(tickCount=6, tickMinStep=1)).scale(nice=False),
        y=y,
        color=colour(keys(experiment.series)),
    )
    return layered(
        base.mark_line(strokeWidth=1.6, aria=False),
        base.mark_point(filled=True, opacity=1, size=14).encode(description="label:N"),
        title=f"Epoch {epoch:g}",
    )


def _blocks_sentence(experiment: Experiment, epoch: float) -> str:
    clauses = []
    for series in experiment.series:
        gradients = _of_blocks(series, epoch)
        if len(gradients) > 1:
            (first, at_first), (last, at_last) = gradients[0], gradients[-1]
            clauses.append(
                f"{at_last.mean / at_first.mean:.2g} times as strong at block {last} as at block "
                f"{first} with {series.name} ({seeds(len(series.runs))})"
            )
    return f"At epoch {epoch:g} the gradient is {'; '.join(clauses)}."


def first_table(epochs: Sequence[float], found: dict[str, Gradients]) -> Table:
    """The gradient at the first convolution, a column for each kind.

    If there is one other kind besides constant depth, a column has their ratio.
    """
    table = Table(
        title="Mean absolute gradient at the first convolution\nmean over an epoch's steps",
        title_justify="left",
    )
    table.add_column("epoch", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    others = [name for name in found if name != "constant"]
    has_ratio = "constant" in found and len(others) == 1
    if has_ratio:
        table.add_column("ratio", justify="right")
    for at, epoch in enumerate(epochs):
        row = [f"{epoch:g}", *(_small(of_kind.first[at]) for of_kind in found.values())]
        if has_ratio:
            ratio = found[others[0]].first[at].mean / found["constant"].first[at].mean
            row.append(f"{ratio:.2f}")
        table.add_row(*row)
    return table


def block_table(name: str, epochs: Sequence[float], found: Gradients, most: int) -> Table:
    """The gradient at the first convolution of each block, a column for each epoch."""
    table = Table(
        title=(
            f"{name}: the same at the first convolution of each block\n"
            "mean over the sampled steps in which it was open"
        ),
        title_justify="left",
    )
    for column in ("block", *(f"epoch {epoch:g}" for epoch in epochs)):
        table.add_column(column, justify="right")
    blocks = len(found.blocks[0])
    shown = min(max(2, most), blocks)
    for block in sorted({round(i * (blocks - 1) / max(1, shown - 1)) for i in range(shown)}):
        values = (of_epoch[block] for of_epoch in found.blocks)
        cells = ("-" if value is None else f"{value:.2e}" for value in values)
        table.add_row(f"{block + 1}", *cells)
    return table


def _small(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.0e}"
    return f"{spread.mean:.2e}{deviation}"
