"""Results of the runs of one configuration: their means and deviations over seeds.

Every table, chart and sentence about runs takes its numbers from here.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from stochastic_depth.train import Record, best_record


@dataclass(frozen=True)
class Spread:
    """The mean and the sample standard deviation over seeds; None with a single seed."""

    mean: float
    deviation: float | None

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), deviation)


@dataclass(frozen=True)
class RunOutcome:
    """Results of one run."""

    test_error_best: float
    """Percent, at the epoch of the best validation error, as the paper reports it."""
    test_error_last: float
    """Percent, after the last recorded epoch."""
    seconds: float
    """Seconds of training, without evaluation."""
    active_blocks: float
    """The mean over training steps."""

    @staticmethod
    def of(records: Sequence[Record]) -> "RunOutcome":
        """The outcome of a journal, which must have at least one record."""
        return RunOutcome(
            best_record(list(records)).test_error,
            records[-1].test_error,
            sum(record.seconds for record in records),
            statistics.fmean((r.active_blocks for r in records), interval_steps(records)),
        )


def interval_steps(records: Sequence[Record]) -> list[int]:
    """The training steps of each interval between evaluations; the last is often shorter."""
    return [end - start for start, end in pairwise([0, *(record.step for record in records)])]


@dataclass(frozen=True)
class Outcome:
    """Results of one configuration over its seeds; the fields are those of `RunOutcome`."""

    test_error_best: Spread
    test_error_last: Spread
    seconds: Spread
    active_blocks: Spread

    @staticmethod
    def of(journals: Iterable[Sequence[Record]]) -> "Outcome":
        """The outcome of one journal for each seed; there must be at least one."""
        runs = [RunOutcome.of(records) for records in journals]
        names = [field.name for field in fields(Outcome)]
        return Outcome(*(Spread.of([getattr(run, name) for run in runs]) for name in names))


def standard_error(a: Spread, b: Spread, of_a: int, of_b: int) -> float | None:
    """The standard error of the difference of two means over `of_a` and `of_b` seeds (Welch).

    None if one of them has a single seed.
    """
    if a.deviation is None or b.deviation is None:
        return None
    return math.sqrt(a.deviation**2 / of_a + b.deviation**2 / of_b)
