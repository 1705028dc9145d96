"""Errors, seconds, savings and settings as tables, with the published numbers beside ours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from stochastic_depth.lab.experiments import Experiment, Series
from stochastic_depth.lab.formatting import (
    duration,
    percent,
    plus_minus,
    share,
    timing_note,
)
from stochastic_depth.lab.outcomes import RunOutcome, Spread
from stochastic_depth.lab.recorded import RecordedRun
from stochastic_depth.lab.titles import flat
from stochastic_depth.plain_text import count_text, epoch_text
from stochastic_depth.recipes import PUBLISHED, RECIPES, Published
from stochastic_depth.train import Config


@dataclass(frozen=True)
class ReportTable:
    """A table of texts; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> Table:
        """The same table for a console."""
        table = Table(title=self.title, title_justify="left")
        table.caption, table.caption_justify = self.note, "left"
        for number, name in enumerate(self.head):
            table.add_column(name, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


def tables(experiment: Experiment) -> list[ReportTable]:
    """The tables of the part of an experiment that can be compared."""
    now = experiment.comparable()
    published = {series.name: published_for(series) for series in now.series}
    made = [_errors(now, published), _seconds(now, published)]
    return [*made, _savings(now)] if now.stochastic else made


def published_for(series: Series) -> tuple[Config, Published] | None:
    """The published recipe with the same data, network and survival, whatever its schedule."""
    wanted = series.runs[0].run.config.without_seed()
    for name, published in PUBLISHED.items():
        recipe = RECIPES[name]()
        kind = recipe.without_seed()
        if (kind.data, kind.model, kind.survival) == (wanted.data, wanted.model, wanted.survival):
            return recipe, published
    return None


PublishedBySeries = dict[str, tuple[Config, Published] | None]


def _errors(now: Experiment, published: PublishedBySeries) -> ReportTable:
    head = ["", "seeds", "best validation", "last epoch"]
    rows = [
        [
            series.name,
            str(len(series.runs)),
            percent(series.outcome.test_error_best),
            percent(series.outcome.test_error_last),
        ]
        for series in now.series
    ]
    found = [published[series.name] for series in now.series]
    if any(found):
        head.append("published")
        for row, match in zip(rows, found, strict=True):
            row.append(f"{match[1].error:.2f} %" if match else "")
    note = "Test error, mean ± standard deviation over seeds, at the epoch of the best validation "
    note += "error and at the last one."
    return ReportTable("Test error", head, rows, " ".join([note, *_sources(now, found)]))


def _seconds(now: Experiment, published: PublishedBySeries) -> ReportTable:
    interval = "epoch" if now.config.evaluate_every is None else "interval"
    head = ["", "training", f"{now.average} {interval}", "ratio"]
    base = now.constant
    rows = [
        [
            series.name,
            f"{plus_minus(spread)} s" if spread.mean < 100 else _long(spread),
            duration(now.interval_seconds(series)),
            "" if saved is None else f"{1 - saved:.3f}",
        ]
        for series in now.series
        for spread, saved in [(series.outcome.seconds, now.time_saved(series))]
    ]
    found = [published[series.name] for series in now.series]
    reference = published[base.name] if base else None
    timed = [match is not None and match[1].seconds is not None for match in found]
    if any(timed):
        head += ["published", "published ratio"]
        for row, match in zip(rows, found, strict=True):
            seconds = match[1].seconds if match else None
            whole = reference[1].seconds if reference else None
            row += [
                duration(seconds) if seconds else "",
                f"{seconds / whole:.3f}" if seconds and whole else "",
            ]
    note = f"Without evaluation. Ratios are to constant depth, of {now.average}s."
    return ReportTable("Training time", head, rows, f"{note} {timing_note(now.runs)}".rstrip())


def _long(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.0f} s"
    return duration(spread.mean) + deviation


def _savings(now: Experiment) -> ReportTable:
    rows = [
        [
            series.name,
            f"{plus_minus(series.outcome.active_blocks)} of {len(series.cost.survival)}",
            f"{series.expected_active_blocks:.2f}",
            _saved(now, series),
            share(series.cost.saving),
        ]
        for series in now.stochastic
    ]
    head = ["", "active blocks", "expected", "time saved", "FLOPs saved"]
    note = "The FLOPs of dropped blocks, forward and backward, are the most that can be saved."
    return ReportTable("Saving", head, rows, note)


def _saved(now: Experiment, series: Series) -> str:
    saved = now.time_saved(series)
    return "" if saved is None else share(saved)


def _sources(now: Experiment, found: Sequence[tuple[Config, Published] | None]) -> list[str]:
    """Sentences that name the publications, and their epochs where these differ from ours."""
    matches = [match for match in found if match]
    said = []
    for source in dict.fromkeys(published.source for _, published in matches):
        epochs = {recipe.epochs for recipe, published in matches if published.source == source}
        other = epochs - {now.config.epochs}
        schedule = f", after {' or '.join(map(str, sorted(other)))} epochs" if other else ""
        said.append(f"Published: {source}{schedule}.")
    return said


@dataclass(frozen=True)
class Tile:
    """A number in large type, and a number to compare it with."""

    label: str
    value: str
    beside: str


def tiles(experiment: Experiment) -> list[Tile]:
    """The tiles of stochastic depth, or of constant depth if there is nothing else."""
    now = experiment.comparable()
    series = now.main
    base = now.constant if now.stochastic else None
    error, seconds = series.outcome.test_error_best, series.outcome.seconds
    made = [
        Tile(
            f"Test error, {series.name}",
            percent(error),
            f"{base.name} {percent(base.outcome.test_error_best)}" if base else "",
        ),
        Tile(
            "Training time",
            duration(seconds.mean),
            f"{base.name} {duration(base.outcome.seconds.mean)}" if base else "",
        ),
    ]
    saved = now.time_saved(series)
    if base and saved is None:
        made[1] = replace(made[1], beside=timing_note([*base.runs, *series.runs]))
    elif base and saved is not None:
        expected = f"expected from FLOPs {share(series.cost.saving)}"
        made.append(Tile("Time saved", share(saved), expected))
    return made


def overview(experiments: list[Experiment]) -> ReportTable:
    """A table with a row for each experiment."""
    rows = []
    for now in (experiment.comparable() for experiment in experiments):
        series, base = now.main, now.constant
        rows.append(
            [
                f"{now.title} ({now.progress})" if now.progress else now.title,
                percent(base.outcome.test_error_best) if base else "",
                percent(series.outcome.test_error_best) if now.stochastic else "",
                _saved(now, series) if now.stochastic else "",
                share(series.cost.saving) if now.stochastic else "",
            ]
        )
    head = ["", "constant", "stochastic", "time saved", "FLOPs saved"]
    return ReportTable("Test error and saving", head, rows)


DESCRIBED = ("runtime", "machine", "versions", "git_commit", "created")
"""The fields of `config.json` that are shown, besides the configuration."""


def settings(runs: Sequence[RecordedRun]) -> tuple[list[tuple[str, str]], ReportTable]:
    """The settings that all runs share, and a table with those in which they differ."""
    described = [
        flat({**run.description["config"], **{k: run.description.get(k) for k in DESCRIBED}})
        for run in runs
    ]
    names = list(dict.fromkeys(name for one in described for name in one))
    shared = [n for n in names if len({one.get(n, "") for one in described}) == 1]
    apart = [name for name in names if name not in shared]
    head = ["run", "state", "test error", "seconds", *apart]
    rows = [
        [run.name, *_state(run), *(one.get(name, "") for name in apart)]
        for run, one in zip(runs, described, strict=True)
    ]
    common = [(name, described[0][name]) for name in shared if described[0][name]]
    return common, ReportTable("Runs", head, rows)


def _state(run: RecordedRun) -> list[str]:
    reached = run.records[-1].epoch if run.records else 0
    state = f"{epoch_text(reached)} of {count_text(run.run.config.epochs, 'epoch')}"
    if run.finished:
        state = "finished"
    elif run.failed:
        state = f"failed after {state}"
    if not run.records:
        return [state, "", ""]
    found = RunOutcome.of(run.records)
    return [state, f"{found.test_error_best:.2f} %", duration(found.seconds)]
