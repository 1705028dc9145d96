"""What a report has: a section for each experiment, sweep and benchmark, from its sources."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from stochastic_depth.lab.active_blocks_chart import active_blocks_figure, drop_rates_figure
from stochastic_depth.lab.bench.depth_chart import depth_cost
from stochastic_depth.lab.charts import Figure
from stochastic_depth.lab.ensemble_chart import ensemble_figure
from stochastic_depth.lab.experiments import Experiment, distinct, experiments
from stochastic_depth.lab.gradients_chart import block_gradients, gradient_strength
from stochastic_depth.lab.pruning_chart import pruned_blocks
from stochastic_depth.lab.recorded import RecordedRun, RecordedSweep, Sources
from stochastic_depth.lab.sweep.charts import depth_sweep, gates_sweep, survival_sweep
from stochastic_depth.lab.tables import ReportTable, Tile, overview, settings, tables, tiles
from stochastic_depth.lab.titles import describe, describe_data, flat
from stochastic_depth.lab.training_curves import training_curves, training_time
from stochastic_depth.plain_text import count_text

COMMANDS = {
    "ensemble": "stochastic-depth analyze ensemble RUN",
    "pruned-blocks": "stochastic-depth analyze pruning RUN",
    "survival-sweep": "stochastic-depth sweep survival RECIPE",
    "depth-sweep": "stochastic-depth sweep depth RECIPE",
    "gates-sweep": "stochastic-depth sweep gates RECIPE",
    "depth-cost": "stochastic-depth bench depth --out FILE",
}
"""The commands that measure the data of a figure, by the id of the figure. All other figures need
nothing but journals."""


@dataclass(frozen=True)
class Section:
    """The part of a page about one experiment, sweep or benchmark."""

    title: str
    figures: tuple[Figure, ...]
    sentence: str = ""
    tiles: tuple[Tile, ...] = ()
    tables: tuple[ReportTable, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    runs: ReportTable | None = None
    code: str = ""
    """Python code for the reader to paste."""


@dataclass(frozen=True)
class Report:
    """All sections of a page."""

    sections: tuple[Section, ...]
    overview: ReportTable | None = None
    """A table of all experiments, if there are several."""
    commands: tuple[str, ...] = ()
    """The commands that measure the data of further figures."""


def build_report(sources: Sources) -> Report:
    """Everything that `sources` can show. Figures in different sections have different ids."""
    trained = experiments(sources.runs)
    failed = [run for run in sources.runs if not run.records and run.failed]
    begun = [run for run in sources.runs if not run.records and not run.failed]
    measured = [run for run in sources.runs if run.records]
    kept = distinct(measured)
    repeated = [run for run in measured if run not in kept]
    sections = [
        *map(_experiment, trained),
        *_not_drawn("Runs that have begun", "No record in the journal yet", begun),
        *_not_drawn("Runs that have failed", "Failed before the first record", failed),
        *_not_drawn("Repeated runs", "Another run of the same seed is shown", repeated),
        *map(_sweep, sources.sweeps),
        *map(_benchmark, sources.benchmarks),
    ]
    drawn = {figure.id for section in sections for figure in section.figures}
    return Report(
        tuple(_with_distinct_ids(sections)),
        overview(trained) if len(trained) > 1 else None,
        tuple(command for id, command in COMMANDS.items() if id not in drawn),
    )


def _experiment(experiment: Experiment) -> Section:
    drawn: list[Figure | None] = [
        training_curves(experiment),
        training_time(experiment),
        drop_rates_figure(experiment),
        gradient_strength(experiment),
        block_gradients(experiment),
        *_of_each(experiment, active_blocks_figure),
        *_of_each(experiment, ensemble_figure),
        pruned_blocks(experiment),
    ]
    shared, runs = settings(list(experiment.runs))
    progress = experiment.comparable().progress
    return Section(
        experiment.title,
        tuple(figure for figure in drawn if figure),
        f"{progress.capitalize()}." if progress else "",
        tiles=tuple(tiles(experiment)),
        tables=tuple(tables(experiment)),
        settings=tuple(shared),
        runs=runs,
    )


def _not_drawn(title: str, why: str, runs: list[RecordedRun]) -> Iterator[Section]:
    """A section that lists `runs`, if there are any."""
    if runs:
        shared, table = settings(runs)
        said = [
            f"{run.run.path} ({run.failure})" if run.failed else str(run.run.path) for run in runs
        ]
        yield Section(title, (), f"{why}: {', '.join(said)}.", settings=tuple(shared), runs=table)


def _of_each(experiment: Experiment, draw: Callable[..., Figure | None]) -> Iterable[Figure | None]:
    """A figure for each kind of stochastic depth; the id of the first has no number."""
    drawn = [figure for series in experiment.stochastic if (figure := draw(series))]
    return [replace(f, id=f"{f.id}-{n}" if n > 1 else f.id) for n, f in enumerate(drawn, start=1)]


def _sweep(recorded: RecordedSweep) -> Section:
    sweep = recorded.sweep
    draw = {"survival": survival_sweep, "depth": depth_sweep, "gates": gates_sweep}[sweep.kind]
    drawn = draw(recorded)
    finished = sum(run.finished for run in recorded.runs)
    failed = sum(run.failed for run in recorded.runs)
    said = f"{sweep.folder}: {finished} of {count_text(recorded.size, 'run')} finished"
    said += f", {failed} failed, for the reason in the failed.txt of each." if failed else "."
    if recorded.others:
        said += f" Left out, because the grid has no such runs: {', '.join(recorded.others)}."
    if not recorded.runs:
        return Section(f"Sweep {sweep.folder.name}", (), said)
    shared, runs = settings(recorded.runs)
    if sweep.kind == "depth":
        title = f"p_L against depth, {describe_data(sweep.config)}"
    elif sweep.kind == "gates":
        title = f"Ways of gating, {describe(sweep.config)}"
    else:
        title = f"p_L at one depth, {describe(sweep.config)}"
    return Section(title, (drawn,) if drawn else (), said, settings=tuple(shared), runs=runs)


def _benchmark(result: dict[str, Any]) -> Section:
    described = {k: result.get(k) for k in ("settings", "runtime", "machine", "versions")}
    return Section("Cost of depth", (depth_cost(result),), settings=tuple(flat(described).items()))


def _with_distinct_ids(sections: list[Section]) -> Iterable[Section]:
    if len(sections) == 1:
        return sections
    taken: dict[str, int] = {}
    made = []
    for section in sections:
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")[:60]
        taken[slug] = taken.get(slug, 0) + 1
        prefix = slug if taken[slug] == 1 else f"{slug}-{taken[slug]}"
        figures = tuple(replace(f, id=f"{prefix}-{f.id}") for f in section.figures)
        made.append(replace(section, figures=figures))
    return made
