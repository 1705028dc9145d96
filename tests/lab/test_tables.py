import io
import re
import statistics
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import ttest_ind

from stochastic_depth.lab.expected_cost import expected_cost
from stochastic_depth.lab.experiments import experiments
from stochastic_depth.lab.formatting import difference, duration, share
from stochastic_depth.lab.outcomes import Spread, standard_error
from stochastic_depth.lab.recorded import read_sources
from stochastic_depth.lab.tables import overview, published_for, tables, tiles
from stochastic_depth.lab.training_curves import training_time
from stochastic_depth.recipes import PUBLISHED, RECIPES, describe_recipe
from stochastic_depth.train import DataConfig
from stochastic_depth.train.schedule_config import ScheduleConfig
from support.runs import trained_by


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_hours_that_a_recipe_names_are_those_that_were_published(name):
    took = re.search(r"\((\d+) h (\d+) min\)", describe_recipe(name))
    hours = 3600 * int(took[1]) + 60 * int(took[2]) if took else None
    assert PUBLISHED[name].seconds == hours


def test_runs_are_held_against_what_was_published_for_the_same_network(experiment):
    def held(series, **changes):
        trained = series.runs[0]
        config = replace(trained.run.config, **changes)
        run = replace(trained, run=replace(trained.run, config=config))
        return published_for(replace(series, survival=config.survival, runs=(run,)))

    constant, stochastic = experiment.series
    recipe = RECIPES["cifar10-resnet110"]()
    same = {"data": recipe.data, "model": recipe.model}
    assert held(stochastic, **same)[1].error == 5.23
    assert held(constant, **same)[1].error == 6.41
    assert held(constant, **same)[1].seconds == 3600 * 20 + 60 * 42
    assert held(stochastic, **same, epochs=3, seed=9)[1].error == 5.23
    assert held(stochastic) is None
    fewer = DataConfig(name="cifar10", train=1000)
    assert held(stochastic, data=fewer, model=recipe.model) is None
    harder = replace(recipe.survival, final=0.2)
    assert held(stochastic, **same, survival=harder) is None


def test_tables_hold_mean_and_deviation_over_seeds(experiment):
    error, time, saving = tables(experiment)
    last = [run.records[-1].test_error for run in experiment.constant.runs]
    assert error.rows[0][0] == "constant depth"
    assert error.rows[0][3] == f"{np.mean(last):.2f} ± {np.std(last, ddof=1):.2f} %"
    seconds = [sum(r.seconds for r in run.records) for run in experiment.constant.runs]
    assert time.rows[0][1].startswith(f"{np.mean(seconds):.2f} ± ")
    assert time.rows[0][3] == "1.000"
    assert saving.rows[0][2] == "4.25"
    assert all(len(row) == len(t.head) for t in (error, time, saving) for row in t.rows)
    console = Console(file=io.StringIO(), width=80)
    console.print(error.rich())
    for text in (error.title, *error.head, *error.rows[0], "at the last one"):
        assert text in console.file.getvalue()


def test_the_headline_is_error_time_and_saving_against_the_expected(experiment):
    error, time, saved = tiles(experiment)
    assert error.label == "Test error, stochastic depth"
    assert "constant depth" in error.beside
    assert "constant depth" in time.beside
    constant, stochastic = experiment.series
    share = 1 - _median(stochastic) / _median(constant)
    assert saved.value == f"{100 * share:.1f} %"
    assert saved.beside == f"expected from FLOPs {100 * stochastic.cost.saving:.1f} %"


def test_seconds_of_different_engines_are_not_compared(experiment):
    apart = trained_by(experiment, "compiled")
    note = "The runs, or parts of them, differ in their engine: the seconds are not to be compared."
    error, time = tiles(apart)
    assert error == tiles(experiment)[0]
    assert time.beside == note
    _, seconds, saving = tables(apart)
    assert seconds.note.endswith(note)
    assert [row[3] for row in seconds.rows] == ["1.000", ""]
    assert saving.rows[0][3] == ""
    assert overview([apart]).rows[0][3] == ""
    figure = training_time(apart)
    assert figure.note.endswith(note)
    assert "saves" not in figure.sentence


def _median(series) -> float:
    return statistics.median(r.seconds for run in series.runs for r in run.records)


def test_runs_under_way_are_compared_at_equal_epochs(experiment):
    constant, stochastic = experiment.series
    behind = replace(stochastic.runs[0], finished=False, records=stochastic.runs[0].records[:1])
    series = replace(stochastic, runs=(behind,))
    now = replace(experiment, series=(constant, series)).comparable()
    assert {len(run.records) for run in now.runs} == {1}
    ahead = replace(
        experiment, series=(constant, replace(stochastic, runs=(behind, stochastic.runs[1])))
    )
    assert {len(run.records) for run in ahead.comparable().runs} == {2}
    assert len(ahead.comparable().series[1].runs) == 1


def test_a_seed_that_has_just_begun_does_not_take_the_comparison_back(experiment):
    """Two epochs are compared, of the one seed of each kind that has reached the second."""
    constant, stochastic = experiment.series

    def one_behind(series):
        first, second = (replace(run, finished=False) for run in series.runs)
        return replace(series, runs=(replace(first, records=first.records[:1]), second))

    under_way = replace(stochastic, runs=tuple(replace(r, finished=False) for r in stochastic.runs))
    now = replace(experiment, series=(one_behind(constant), under_way)).comparable()
    assert [len(series.runs) for series in now.series] == [1, 2]
    assert {run.records[-1].epoch for run in now.runs} == {2}
    assert now.constant.runs[0].name == constant.runs[1].name


def test_runs_under_way_are_marked_in_the_overview(experiment):
    (stochastic,) = experiment.stochastic
    behind = replace(stochastic.runs[0], finished=False, records=stochastic.runs[0].records[:1])
    under_way = replace(experiment, series=(replace(stochastic, runs=(behind,)),))
    names = [row[0] for row in overview([experiment, under_way]).rows]
    assert names == [experiment.title, f"{experiment.title} (after 1 of 2 epochs)"]
    ahead = replace(
        experiment, series=(experiment.constant, replace(stochastic, runs=stochastic.runs[1:]))
    )
    assert ahead.progress == ""


def test_runs_are_put_together_by_all_but_survival_and_seed(compared, survival_sweep, experiment):
    assert [series.name for series in experiment.series] == ["constant depth", "stochastic depth"]
    assert experiment.title == "ResNet-14 on digits, 2 epochs"
    runs = read_sources(sorted((survival_sweep / "runs").iterdir())).runs
    (swept,) = experiments(runs)
    assert [series.name for series in swept.series] == [
        "constant depth",
        "linear decay to 1",
        "linear decay to 0.5",
        "uniform 1",
        "uniform 0.5",
    ]
    assert swept.main.name == "linear decay to 0.5"
    assert len({series.colour for series in swept.series}) == 5
    assert len(overview([experiment, swept]).rows) == 2


def test_constant_depth_alone_is_an_experiment(experiment):
    (alone,) = experiments(experiment.constant.runs)
    assert [series.name for series in alone.series] == ["constant depth"]
    assert [table.title for table in tables(alone)] == ["Test error", "Training time"]
    assert tiles(alone)[0].label == "Test error, constant depth"


def test_schedules_are_named_by_the_settings_that_they_use(experiment):
    (constant, stochastic) = (series.runs[0] for series in experiment.series)

    def scheduled(**settings):
        survival = replace(stochastic.run.config.survival, schedule=ScheduleConfig(**settings))
        config = replace(stochastic.run.config, survival=survival, seed=7)
        return replace(stochastic, run=replace(stochastic.run, config=config, id=str(settings)))

    runs = [
        constant,
        stochastic,
        scheduled(kind="early", until=0.3),
        scheduled(kind="steps", at=(0, 0.5), shares=(0.5, 1)),
        scheduled(kind="none"),  # another seed of `stochastic`
    ]
    (named,) = experiments(runs)
    assert {series.name for series in named.series} == {
        "constant depth",
        "linear decay to 0.5",
        "linear decay to 0.5, early until 0.3 linear",
        "linear decay to 0.5, steps at 0/0.5 shares 0.5/1",
    }
    assert sorted(len(series.runs) for series in named.series) == [1, 1, 1, 2]


def test_a_difference_is_said_with_what_chance_does(experiment):
    constant, stochastic = experiment.series
    a, b = [5.0, 5.2], [6.0, 6.3]
    error = standard_error(Spread.of(a), Spread.of(b), 2, 2)
    welch = ttest_ind(a, b, equal_var=False)
    assert (np.mean(a) - np.mean(b)) / error == pytest.approx(welch.statistic)
    shown = difference(Spread.of(a), Spread.of(b), stochastic, constant)
    assert (
        shown == "stochastic depth is 1.05 points below, more than twice its standard error of 0.18"
    )
    shown = difference(Spread.of([5, 8]), Spread.of(b), stochastic, constant)
    assert shown.endswith("less than twice its standard error of 1.51: it may be chance")
    shown = difference(Spread.of([5]), Spread.of(b), stochastic, constant)
    assert "with one seed each, this may be chance" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0123, "12.3 ms"),
        (18.71, "18.7 s"),
        (99.96, "1 min 40 s"),
        (119.6, "2 min 00 s"),
        (205, "3 min 25 s"),
        (3599.4, "59 min 59 s"),
        (3599.9, "1 h 00 min"),
        (3600 * 15 + 420, "15 h 07 min"),
    ],
)
def test_durations_are_told_as_people_do(seconds, shown):
    assert duration(seconds) == shown


def test_under_a_schedule_the_expected_saving_is_the_mean_over_the_steps(experiment):
    (stochastic,) = experiment.stochastic
    full = stochastic.cost
    run = stochastic.runs[0].run
    steps_per_epoch = stochastic.runs[0].records[-1].step // run.config.epochs
    whole = run.config.epochs * steps_per_epoch
    schedule = ScheduleConfig("steps", at=(0.0, 0.5), shares=(0.25, 1.0))
    half = replace(run.config, survival=replace(run.config.survival, schedule=schedule))

    def saving(steps=None):
        return expected_cost(half, run.shape, len(run.classes), steps_per_epoch, steps)

    shares = [0.25 if step < round(whole / 2) else 1.0 for step in range(whole)]
    mean = sum(shares) / whole
    assert saving().saving == pytest.approx(mean * full.saving)
    assert saving().survival == pytest.approx([1 - mean * (1 - p) for p in full.survival])
    assert saving(whole // 2).saving == pytest.approx(0.25 * full.saving)
    series = replace(stochastic, survival=half.survival)
    assert series.cost.saving == pytest.approx(mean * full.saving)


def test_a_share_that_is_nothing_has_no_sign():
    assert [share(value) for value in (-0.0001, 0.2549, -0.02)] == ["0.0 %", "25.5 %", "-2.0 %"]
