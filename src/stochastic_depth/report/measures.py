"""What the runs of a series came to: mean and spread over its seeds."""

import math
import statistics

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.report.experiment import Series
from stochastic_depth.train import best_record


def error_at_best(series: Series) -> Spread:
    """Test error at the epoch of the best validation error, percent: what the paper reports."""
    return Spread.of([best_record(list(run.records)).test_error for run in series.runs])


def error_at_last(series: Series) -> Spread:
    """Test error after the last epoch there is, percent."""
    return Spread.of([run.records[-1].test_error for run in series.runs])


def training_seconds(series: Series) -> Spread:
    """Of a whole run, without evaluation."""
    return Spread.of([sum(record.seconds for record in run.records) for run in series.runs])


def active_blocks(series: Series) -> Spread:
    """Mean over the steps of a run."""
    return Spread.of(
        [statistics.fmean(r.active_blocks for r in run.records) for run in series.runs]
    )


def interval_seconds(series: Series) -> float:
    """Median over the intervals between evaluations (an epoch each, if not said otherwise)."""
    return statistics.median(record.seconds for run in series.runs for record in run.records)


def time_saved(series: Series, constant: Series) -> float:
    """The share of constant depth's time, median interval against median interval."""
    return 1 - interval_seconds(series) / interval_seconds(constant)


def on_one_machine(*series: Series) -> bool:
    """Whether their seconds can be compared."""
    machines = {str(run.described.get("machine")) for one in series for run in one.runs}
    return len(machines) == 1


def standard_error(a: Spread, b: Spread, of_a: int, of_b: int) -> float | None:
    """Of the difference of two means over so many seeds each (Welch); None without a spread."""
    if a.deviation is None or b.deviation is None:
        return None
    return math.sqrt(a.deviation**2 / of_a + b.deviation**2 / of_b)
