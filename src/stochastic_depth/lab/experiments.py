"""Which runs belong together: series that differ only in their seed, in experiments.

`experiments` groups runs: the runs of an `Experiment` differ only in survival and seed, those of a
`Series` only in their seed.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

from stochastic_depth.lab.expected_cost import ExpectedCost, expected_cost
from stochastic_depth.lab.outcomes import Outcome, interval_steps
from stochastic_depth.lab.recorded import RecordedRun
from stochastic_depth.lab.style import CONSTANT_COLOUR, STOCHASTIC
from stochastic_depth.lab.titles import CONSTANT, series_names, titles
from stochastic_depth.plain_text import count_text, epoch_text
from stochastic_depth.train import Config, SurvivalConfig
from stochastic_depth.train.runtime import timing_conditions

Average = Literal["median", "mean"]


@dataclass(frozen=True)
class Series:
    """The runs of one configuration, one for each seed."""

    name: str
    colour: str
    survival: SurvivalConfig
    runs: tuple[RecordedRun, ...]
    """At least one, each with at least one record."""

    @property
    def constant(self) -> bool:
        return self.survival.rule == "constant"

    @property
    def cost(self) -> ExpectedCost:
        """What stochastic depth is expected to save in the steps that were taken."""
        run, records = self.runs[0].run, self.runs[0].records
        steps_per_epoch = round(records[-1].step / records[-1].epoch)
        config = replace(run.config, survival=self.survival)
        return expected_cost(config, run.shape, len(run.classes), steps_per_epoch, records[-1].step)

    @property
    def expected_active_blocks(self) -> float:
        """The mean over the seeds, and over the training steps that were taken."""
        return statistics.fmean(
            statistics.fmean(
                (record.expected_active_blocks for record in run.records),
                interval_steps(run.records),
            )
            for run in self.runs
        )

    @cached_property
    def outcome(self) -> Outcome:
        """Results over the seeds."""
        return Outcome.of(run.records for run in self.runs)

    def step_seconds(self, average: Average) -> float:
        """The seconds of a training step: the median of the intervals, or the mean of all steps."""
        steps = [n for run in self.runs for n in interval_steps(run.records)]
        seconds = [record.seconds for run in self.runs for record in run.records]
        if average == "mean":
            return sum(seconds) / sum(steps)
        return statistics.median(taken / n for taken, n in zip(seconds, steps, strict=True))


@dataclass(frozen=True)
class Experiment:
    """One network on one data set with one training schedule; constant depth comes first."""

    title: str
    series: tuple[Series, ...]

    @property
    def config(self) -> Config:
        """The configuration of one of its runs; they differ in survival, seed and place."""
        return self.series[0].runs[0].run.config

    @property
    def runs(self) -> Iterator[RecordedRun]:
        for series in self.series:
            yield from series.runs

    @property
    def constant(self) -> Series | None:
        return next((series for series in self.series if series.constant), None)

    @property
    def stochastic(self) -> tuple[Series, ...]:
        return tuple(series for series in self.series if not series.constant)

    @property
    def main(self) -> Series:
        """The series for the headline: stochastic depth as in the paper, or the nearest to it.

        The nearest is the one that differs in the fewest settings.
        """
        if not self.stochastic:
            return self.series[0]
        paper = SurvivalConfig()

        def distance(series: Series) -> tuple[int, bool, float]:
            survival = series.survival
            names = (field.name for field in fields(survival))
            differing = sum(getattr(survival, n) != getattr(paper, n) for n in names)
            return differing, survival.rule != paper.rule, abs(survival.final - paper.final)

        return min(self.stochastic, key=distance)

    @property
    def average(self) -> Average:
        """How the seconds of intervals are averaged in every series.

        The median leaves out disturbances; under a schedule, which makes the steps of one run
        differ, it is the mean.
        """
        scheduled = any(series.survival.schedule.kind != "none" for series in self.series)
        return "mean" if scheduled else "median"

    def interval_seconds(self, series: Series) -> float:
        """The average seconds of a whole interval between evaluations, usually an epoch."""
        steps = max(n for run in self.runs for n in interval_steps(run.records))
        return steps * series.step_seconds(self.average)

    def time_saved(self, series: Series) -> float | None:
        """The share of the time of constant depth that a series saves, by the seconds of a step.

        None without constant depth, or if the seconds of the two cannot be compared.
        """
        constant = self.constant
        if constant is None or timing_differences([*constant.runs, *series.runs]):
            return None
        return 1 - series.step_seconds(self.average) / constant.step_seconds(self.average)

    @property
    def drops(self) -> tuple[float, ...]:
        """The epochs at which the learning rate is divided."""
        config = self.config
        return tuple(config.epochs * fraction for fraction in config.optimizer.milestones)

    @property
    def progress(self) -> str:
        """How far its runs are, such as "after 6 of 400 epochs"; empty if all are finished."""
        if all(run.finished for run in self.runs):
            return ""
        reached, epochs = min(run.records[-1].epoch for run in self.runs), self.config.epochs
        return f"after {epoch_text(reached)} of {count_text(epochs, 'epoch')}"

    def comparable(self) -> "Experiment":
        """The part that can be compared: finished runs if every series has one, or equal epochs.

        Those are up to the last epoch that every series has reached with one run at least, of the
        runs that have reached it. Failed runs are left out, unless all have failed.
        """
        alive = self._of(lambda run: None if run.failed else run)
        if not alive.series:
            alive = self
        if all(any(run.finished for run in series.runs) for series in alive.series):
            return alive._of(lambda run: run if run.finished else None)
        reached = min(max(run.records[-1].epoch for run in one.runs) for one in alive.series)

        def up_to_it(run: RecordedRun) -> RecordedRun | None:
            if run.records[-1].epoch < reached:
                return None
            return replace(run, records=tuple(r for r in run.records if r.epoch <= reached))

        return alive._of(up_to_it)

    def _of(self, chosen: Callable[[RecordedRun], RecordedRun | None]) -> "Experiment":
        series = (
            replace(one, runs=tuple(run for run in map(chosen, one.runs) if run))
            for one in self.series
        )
        return replace(self, series=tuple(one for one in series if one.runs))


def experiments(runs: Sequence[RecordedRun]) -> list[Experiment]:
    """Group the runs that have records: those that differ only in survival and seed together.

    The runs of a group have the same data, and a seed counts once.
    """
    measured = distinct([run for run in runs if run.records])
    alike: dict[tuple[Config, str], list[RecordedRun]] = {}
    for run in measured:
        setting = replace(run.run.config.without_seed(), survival=SurvivalConfig(rule="constant"))
        alike.setdefault((setting, run.run.fingerprint), []).append(run)
    names = titles([setting for setting, _ in alike])
    return [
        Experiment(name, _series(members))
        for name, members in zip(names, alike.values(), strict=True)
    ]


def _series(runs: list[RecordedRun]) -> tuple[Series, ...]:
    def survival(run: RecordedRun) -> SurvivalConfig:
        chosen = run.run.config.survival
        return SurvivalConfig(rule="constant") if chosen.rule == "constant" else chosen

    def order(run: RecordedRun) -> tuple:
        chosen = survival(run)
        return chosen.rule != "constant", chosen.rule, -chosen.final, str(chosen), run.name

    groups = [(s, tuple(g)) for s, g in groupby(sorted(runs, key=order), survival)]
    stochastic = [s for s, _ in groups if s.rule != "constant"]
    names = dict(zip(stochastic, series_names(stochastic), strict=True))
    colours = {s: STOCHASTIC[n % len(STOCHASTIC)] for n, s in enumerate(stochastic)}
    return tuple(
        Series(names.get(s, CONSTANT), colours.get(s, CONSTANT_COLOUR), s, members)
        for s, members in groups
    )


def distinct(runs: Sequence[RecordedRun]) -> list[RecordedRun]:
    """One run for each seed of a configuration on the same data.

    Where there are several, a run that has not failed is preferred, then the one with most records,
    then the newest.
    """

    def merits(run: RecordedRun) -> tuple[bool, int, str]:
        return not run.failed, len(run.records), run.description["created"]

    best: dict[tuple[Config, int, str], RecordedRun] = {}
    for run in runs:
        config = run.run.config
        key = config.without_seed(), config.seed, run.run.fingerprint
        best[key] = max(best.get(key, run), run, key=merits)
    return list(best.values())


def timing_differences(runs: Iterable[RecordedRun]) -> list[str]:
    """What affects speed and differs, between the runs or between parts of a run that was resumed.

    It is empty if their seconds can be compared.
    """
    found: dict[str, set[str]] = {}
    for run in runs:
        began = timing_conditions(run.run.runtime, run.run.machine)
        for conditions in (began, *(each.elsewhere or {} for each in run.records)):
            for name, value in conditions.items():
                found.setdefault(name, set()).add(value)
    return [name for name, values in found.items() if len(values) > 1]
