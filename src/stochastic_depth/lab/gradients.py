"""Gradient strength over training and over depth (the paper, section 5 and figure 7)."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table

from stochastic_depth.errors import RunError
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.lab.recorded import RecordedRun
from stochastic_depth.lab.titles import CONSTANT
from stochastic_depth.plain_text import epoch_text
from stochastic_depth.train import Record


@dataclass(frozen=True)
class Gradients:
    """Mean absolute gradients, epoch by epoch, of runs that differ only in their seed."""

    first: list[Spread]
    """At the first convolution: the mean over the steps before each epoch ends, spread over the
    seeds."""
    blocks: list[list[float | None]]
    """[epochs][L]: at the first convolution of each block, the mean over the sampled steps in which
    it was open, and over the seeds. None where no seed has a value; [] where no block has a
    convolution or linear layer of its own."""


def gradients(runs: Sequence[RecordedRun], epochs: Sequence[float]) -> Gradients:
    """The gradients in the journals of `runs` at these epochs.

    Raises:
        RunError: when a journal has no record of one of them.
    """
    at = [[record_at(run, epoch) for run in runs] for epoch in epochs]
    return Gradients(
        [Spread.of([record.gradient_mean for record in records]) for records in at],
        [block_means(records) for records in at],
    )


def record_at(recorded: RecordedRun, epoch: float) -> Record:
    """The record that was written at `epoch`, to the digits that tables show.

    Raises:
        RunError: when the journal has none; names the epochs that it has.
    """
    shown = epoch_text(epoch)
    alike = [record for record in recorded.records if epoch_text(record.epoch) == shown]
    if alike:
        return min(alike, key=lambda record: abs(record.epoch - epoch))
    known = [epoch_text(record.epoch) for record in recorded.records]
    if len(known) > 10:
        known = [*known[:3], "...", known[-1]]
    path, remedy = recorded.run.path, f"choose --epochs from {', '.join(known)}"
    raise RunError(f"{path} has no epoch {shown} in its journal: {remedy}")


def spread_epochs(runs: Iterable[RecordedRun], count: int = 5) -> list[float]:
    """The first epoch that all `runs` have, the last one, and others evenly between them."""
    shortest = min((run.records for run in runs), key=lambda records: records[-1].epoch)
    last = len(shortest) - 1
    places = {round(i * last / max(1, count - 1)) for i in range(count)}
    return [shortest[place].epoch for place in sorted(places)]


def block_means(records: Iterable[Record]) -> list[float | None]:
    """[L]: the gradient of each block, the mean over the records that have one."""
    of_each = (record.block_gradients for record in records if record.block_gradients)
    known = (
        [value for value in values if value is not None] for values in zip(*of_each, strict=True)
    )
    return [statistics.fmean(values) if values else None for values in known]


def first_table(epochs: Sequence[float], found: dict[str, Gradients]) -> Table:
    """The gradient at the first convolution, a column for each kind.

    If there is one other kind besides constant depth, a column has their ratio.
    """
    table = Table(
        title=(
            "Mean absolute gradient at the first convolution\n"
            "mean over the steps since the evaluation before"
        ),
        title_justify="left",
    )
    table.add_column("epoch", justify="right")
    for name in found:
        table.add_column(name, justify="right")
    others = [name for name in found if name != CONSTANT]
    has_ratio = CONSTANT in found and len(others) == 1
    if has_ratio:
        table.add_column("ratio", justify="right")
    for at, epoch in enumerate(epochs):
        row = [epoch_text(epoch), *(_small(of_kind.first[at]) for of_kind in found.values())]
        if has_ratio:
            ratio = found[others[0]].first[at].mean / found[CONSTANT].first[at].mean
            row.append(f"{ratio:.2f}")
        table.add_row(*row)
    return table


def block_table(name: str, epochs: Sequence[float], found: Gradients, most: int) -> Table:
    """The gradient at the first convolution of blocks, a column for each epoch.

    Args:
        most: how many blocks are shown, at least the first and the last.
    """
    table = Table(
        title=(
            f"{name}: the same at the first convolution of each block\n"
            "mean over the sampled steps in which it was open"
        ),
        title_justify="left",
    )
    for column in ("block", *(f"epoch {epoch_text(epoch)}" for epoch in epochs)):
        table.add_column(column, justify="right")
    blocks = len(found.blocks[0])
    for block in sorted({round(i * (blocks - 1) / (most - 1)) for i in range(most)}):
        values = (of_epoch[block] for of_epoch in found.blocks)
        cells = ("-" if value is None else f"{value:.2e}" for value in values)
        table.add_row(f"{block + 1}", *cells)
    return table


def _small(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.0e}"
    return f"{spread.mean:.2e}{deviation}"
