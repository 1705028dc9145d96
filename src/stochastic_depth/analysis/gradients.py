"""Gradient strength over training and over depth, from journals alone (the paper, section 5)."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.errors import RunError
from stochastic_depth.train import Record, Run


@dataclass(frozen=True)
class Gradients:
    """Of runs that differ in their seed alone: mean absolute gradients, epoch by epoch."""

    first: list[Spread]
    """At the first convolution, mean over the steps up to each epoch, spread over the seeds."""
    blocks: list[list[float | None]]
    """[epochs][L]: at the first convolution of each block, mean over the sampled steps in which it
    was open, and over the seeds. None where no seed has one; [] where the journals are older."""


def gradients(runs: Sequence[Run], epochs: Sequence[float]) -> Gradients:
    """What the journals of `runs` tell of these epochs.

    Raises:
        RunError: when a run has not come to one of them.
    """
    at = [[record_at(run, epoch) for run in runs] for epoch in epochs]
    return Gradients(
        [Spread.of([record.gradient_mean for record in records]) for records in at],
        [_blocks(records) for records in at],
    )


def record_at(run: Run, epoch: float) -> Record:
    """The record of the interval in which `epoch` ends.

    Raises:
        RunError: when there is none yet.
    """
    records = run.records()
    for record in records:
        if record.epoch >= epoch - 1e-9:
            return record
    done = records[-1].epoch if records else 0
    raise RunError(
        f"{run.path} has come to epoch {done:g}, not to {epoch:g}: choose other --epochs"
    )


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
