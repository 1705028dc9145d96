"""Results of runs: groups that differ only in their seed, and their means and deviations.

`experiments` puts runs into groups, the `Series` of each `Experiment`, and the journals of a group
are summed up in an `Outcome`. Every table, chart and sentence about runs takes its numbers from
here.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import Literal

import torch

from stochastic_depth.errors import ApplyError
from stochastic_depth.lab.recorded import RecordedRun
from stochastic_depth.lab.style import CONSTANT_COLOUR, STOCHASTIC
from stochastic_depth.lab.titles import titles
from stochastic_depth.plain_text import count_text, epoch_text
from stochastic_depth.surgery import summary
from stochastic_depth.train import Config, Record, SurvivalConfig, best_record
from stochastic_depth.train.build import apply_survival, build_model
from stochastic_depth.train.config import ModelConfig
from stochastic_depth.train.runtime import timing_conditions
from stochastic_depth.train.schedule_config import ScheduleConfig


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


CONSTANT = "constant depth"
"""What constant depth is called in every table, chart and sentence."""
RULES = {"linear": "linear decay to", "uniform": "uniform"}


def survival_name(survival: SurvivalConfig) -> str:
    """The rule and its p_L, as in every table, chart and sentence."""
    if survival.rule == "constant":
        return CONSTANT
    return f"{RULES[survival.rule]} {survival.final:g}"


@dataclass(frozen=True)
class ExpectedCost:
    """What dropping blocks is expected to save, as the mean over training steps."""

    survival: tuple[float, ...]
    """(p_1, ..., p_L); under a schedule, their means over the steps."""
    saving: float
    """The share of the training FLOPs that dropped blocks save."""


def expected_cost(
    config: Config,
    shape: tuple[int, int, int],
    classes: int,
    steps_per_epoch: int,
    steps: int | None = None,
) -> ExpectedCost:
    """The expected cost of a configuration, counted on its network.

    Args:
        shape: the shape of an image, (channels, height, width).
        steps: how many training steps have been taken; all of the training when not given.

    Raises:
        ApplyError: when the rule is constant depth, which drops nothing.
    """
    full = _cost_at_full_rates(config.model, config.survival, shape, classes)
    whole = config.epochs * steps_per_epoch
    schedule = config.survival.schedule.of(whole)
    if schedule is None:
        return full
    taken = range(0, steps or whole, max(1, (steps or whole) // 1000))
    mean = statistics.fmean(map(schedule, taken))
    return ExpectedCost(tuple(1 - mean * (1 - p) for p in full.survival), mean * full.saving)


@lru_cache
def _cost_at_full_rates(
    model: ModelConfig, survival: SurvivalConfig, shape: tuple[int, int, int], classes: int
) -> ExpectedCost:
    network = build_model(model, shape[0], classes, 0)
    handle = apply_survival(network, replace(survival, schedule=ScheduleConfig()), 0, 1)
    if handle is None:
        raise ApplyError("constant depth drops no block, so that it saves nothing")
    masks = survival.gate == "sample"  # computes every branch
    saving = 0.0 if masks else summary(network, torch.zeros(2, *shape)).expected_saving
    return ExpectedCost(handle.survival, saving)


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
    names = dict(zip(stochastic, _names(stochastic), strict=True))
    colours = {s: STOCHASTIC[n % len(STOCHASTIC)] for n, s in enumerate(stochastic)}
    return tuple(
        Series(names.get(s, CONSTANT), colours.get(s, CONSTANT_COLOUR), s, members)
        for s, members in groups
    )


def _names(stochastic: list[SurvivalConfig]) -> list[str]:
    """A name for each configuration: its rule, and the settings in which the configurations differ.

    Settings with their default value are left out: no two names are alike without them either.
    """
    if len(stochastic) < 2:
        return ["stochastic depth"] * len(stochastic)
    values = [asdict(survival) for survival in stochastic]
    apart = [k for k in values[0] if len({str(value[k]) for value in values}) > 1]
    default = asdict(SurvivalConfig())
    names = []
    for survival, value in zip(stochastic, values, strict=True):
        parts = [survival_name(survival)]
        if "schedule" in apart and survival.schedule.kind != "none":
            parts.append(survival.schedule.name)
        others = (k for k in apart if k not in ("rule", "final", "schedule"))
        chosen = (k for k in others if value[k] != default[k])
        parts += ("balanced" if k == "balance" else f"{k} {value[k]}" for k in chosen)
        names.append(", ".join(parts))
    return names


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


def standard_error(a: Spread, b: Spread, of_a: int, of_b: int) -> float | None:
    """The standard error of the difference of two means over `of_a` and `of_b` seeds (Welch).

    None if one of them has a single seed.
    """
    if a.deviation is None or b.deviation is None:
        return None
    return math.sqrt(a.deviation**2 / of_a + b.deviation**2 / of_b)
