"""Errors, seconds and savings as tables, with the published numbers beside ours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stochastic_depth.recipes import PUBLISHED, RECIPES, Published
from stochastic_depth.report import measures
from stochastic_depth.report.experiment import Experiment, Series
from stochastic_depth.report.wording import duration, percent, plus_minus, share
from stochastic_depth.train import Config, SurvivalConfig


@dataclass(frozen=True)
class Table:
    """Texts; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def tables(experiment: Experiment) -> list[Table]:
    """Of what may be compared now."""
    now = experiment.settled()
    published = {series.name: published_for(series) for series in now.series}
    made = [_errors(now, published), _seconds(now, published)]
    return [*made, _savings(now)] if now.stochastic else made


def published_for(series: Series) -> tuple[Config, Published] | None:
    """The published recipe of the same data, network and survival, whatever its schedule."""
    wanted = _essence(series.runs[0].run.config)
    for name, published in PUBLISHED.items():
        recipe = RECIPES[name]()
        if _essence(recipe) == wanted:
            return recipe, published
    return None


def _essence(config: Config) -> tuple:
    survival = config.survival
    constant = SurvivalConfig(rule="constant")
    return (
        replace(config.data, root=None, workers=0, download=False),
        config.model,
        constant if survival.rule == "constant" else survival,
    )


Found = dict[str, tuple[Config, Published] | None]


def _errors(now: Experiment, published: Found) -> Table:
    head = ["", "seeds", "best validation", "last epoch"]
    rows = [
        [
            series.name,
            str(len(series.runs)),
            percent(measures.error_at_best(series)),
            percent(measures.error_at_last(series)),
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
    return Table("Test error", head, rows, " ".join([note, *_sources(now, found)]))


def _seconds(now: Experiment, published: Found) -> Table:
    head = ["", "training", "median epoch", "ratio"]
    if now.config.evaluate_every is not None:
        head[2] = "median interval"
    base = now.constant
    rows = [
        [
            series.name,
            f"{plus_minus(spread)} s" if spread.mean < 100 else _long(spread),
            duration(measures.interval_seconds(series)),
            f"{1 - measures.time_saved(series, base):.3f}" if base else "",
        ]
        for series in now.series
        for spread in [measures.training_seconds(series)]
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
    note = "Without evaluation. Ratios are to constant depth, of medians."
    if not measures.on_one_machine(*now.series):
        note += " Not all runs were on one machine: their seconds are not to be compared."
    return Table("Training time", head, rows, note)


def _long(spread: measures.Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.0f} s"
    return duration(spread.mean) + deviation


def _savings(now: Experiment) -> Table:
    rows = [
        [
            series.name,
            f"{plus_minus(measures.active_blocks(series))} of {len(series.cost.survival)}",
            f"{sum(series.cost.survival):.2f}",
            share(measures.time_saved(series, now.constant)) if now.constant else "",
            share(series.cost.saving),
        ]
        for series in now.stochastic
    ]
    head = ["", "active blocks", "expected", "time saved", "FLOPs saved"]
    note = "The FLOPs of dropped blocks, forward and backward, are the most that can be saved."
    return Table("Saving", head, rows, note)


def _sources(now: Experiment, found: Sequence[tuple[Config, Published] | None]) -> list[str]:
    """Who published, and with what other schedule."""
    matches = [match for match in found if match]
    said = []
    for source in dict.fromkeys(published.source for _, published in matches):
        epochs = {recipe.epochs for recipe, published in matches if published.source == source}
        other = epochs - {now.config.epochs}
        schedule = f", after {' or '.join(map(str, sorted(other)))} epochs" if other else ""
        said.append(f"Published: {source}{schedule}.")
    return said
