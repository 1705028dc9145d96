"""What is compared between runs, and by which average."""

import shutil
from dataclasses import replace

import pytest

from stochastic_depth.lab.experiments import distinct, experiments, timing_differences
from stochastic_depth.lab.formatting import timing_note
from stochastic_depth.lab.outcomes import RunOutcome, interval_steps
from stochastic_depth.lab.recorded import read_run
from stochastic_depth.lab.training_curves import training_time
from stochastic_depth.train import layout
from stochastic_depth.train.runtime import timing_conditions
from stochastic_depth.train.schedule_config import ScheduleConfig
from support.runs import edit_description

LENGTHS = [100, 100, 100, 7]
"""Steps between evaluations; the training ends before the fourth hundred."""


def timed(series, seconds, active=(4.0, 4.0, 4.0, 6.0)):
    """The series, as if its intervals had these lengths and each step of them these seconds."""
    runs = []
    for run in series.runs:
        records, step = [], 0
        for steps, each, blocks in zip(LENGTHS, seconds, active, strict=True):
            step += steps
            interval = {"step": step, "seconds": steps * each, "active_blocks": blocks}
            records.append(replace(run.records[-1], **interval))
        runs.append(replace(run, records=tuple(records)))
    return replace(series, runs=tuple(runs))


def scheduled(series):
    early = replace(series.survival, schedule=ScheduleConfig(kind="early", until=0.3))
    return replace(series, survival=early)


@pytest.mark.parametrize("kind", [lambda series: series, scheduled])
@pytest.mark.parametrize("seconds", [(0.1, 0.1, 0.1, 0.1), (0.1, 5.0, 0.1, 0.1)])
def test_series_that_take_equal_seconds_save_nothing(experiment, kind, seconds):
    series = tuple(timed(one, seconds) for one in experiment.series)
    experiment = replace(experiment, series=(series[0], kind(series[1])))
    assert experiment.time_saved(experiment.stochastic[0]) == pytest.approx(0)


def test_without_a_schedule_the_median_leaves_out_a_disturbed_interval(experiment):
    constant, stochastic = experiment.series
    series = timed(constant, (0.2, 9.0, 0.2, 0.2)), timed(stochastic, (0.1, 0.1, 0.1, 3.0))
    experiment = replace(experiment, series=series)
    assert experiment.time_saved(series[1]) == pytest.approx(0.5)
    assert experiment.interval_seconds(series[0]) == pytest.approx(100 * 0.2)
    assert training_time(experiment).sentence.startswith("The median epoch takes")


def test_under_a_schedule_every_series_is_averaged_over_all_steps(experiment):
    constant, stochastic = experiment.series
    series = timed(constant, (0.2, 0.2, 0.2, 0.2)), timed(stochastic, (0.1, 0.2, 0.2, 0.2))
    experiment = replace(experiment, series=(series[0], scheduled(series[1])))
    mean = (100 * 0.1 + 207 * 0.2) / 307
    assert experiment.time_saved(experiment.series[1]) == pytest.approx(1 - mean / 0.2)
    figure = training_time(experiment)
    assert figure.sentence.startswith("The mean epoch takes")
    assert "Bars: their mean." in figure.note


def described(path, edit):
    """The run at `path`, after a change of its description."""
    edit_description(path, edit)
    return read_run(path)


def test_runs_of_another_number_of_processes_are_not_compared_in_time(experiment, tmp_path):
    constant, stochastic = experiment.series
    path = tmp_path / "two"
    shutil.copytree(stochastic.runs[0].run.path, path)
    two = described(path, lambda d: d["machine"].update(processes=2))
    assert timing_differences([*constant.runs, two]) == ["processes"]
    note = "The runs, or parts of them, differ in their processes: the seconds are not to be"
    assert timing_note([*constant.runs, two]).startswith(note)
    by_two = replace(experiment, series=(constant, replace(stochastic, runs=(two,))))
    assert by_two.time_saved(by_two.series[1]) is None
    older = described(path, lambda d: d["machine"].pop("processes"))
    assert timing_differences([*constant.runs, older]) == []  # it is not known


def test_a_run_that_was_resumed_otherwise_is_not_compared_in_time(experiment):
    constant, stochastic = experiment.series
    (run, *_) = stochastic.runs
    began = timing_conditions(run.run.runtime, run.run.machine)
    others = {"threads": "7", "processes": "2", "engine": "compiled, reference kernels"}
    for name, value in others.items():
        last = replace(run.records[-1], elsewhere={**began, name: value})
        resumed = replace(run, records=(*run.records[:-1], last))
        assert timing_differences([resumed]) == [name]
        apart = replace(experiment, series=(constant, replace(stochastic, runs=(resumed,))))
        assert apart.time_saved(apart.series[1]) is None
    assert timing_differences([run]) == []


def test_active_blocks_are_averaged_over_steps(experiment):
    (run, *_) = timed(experiment.series[1], (0.1, 0.1, 0.1, 0.1)).runs
    assert interval_steps(run.records) == LENGTHS
    assert RunOutcome.of(run.records).active_blocks == pytest.approx((300 * 4 + 7 * 6) / 307)


def test_a_run_on_other_data_is_no_other_seed(experiment):
    (run, *_) = experiment.stochastic[0].runs
    config = replace(run.run.config, seed=7)
    other = replace(run, run=replace(run.run, id="other", config=config, fingerprint="of birds"))
    found = experiments([run, other])
    assert [list(one.runs) for one in found] == [[run], [other]]
    assert found[1].title == f"{found[0].title} (2)"


def test_a_seed_that_is_trained_again_counts_once_as_far_as_it_has_come(experiment):
    (run, *_) = experiment.stochastic[0].runs
    again = replace(run, run=replace(run.run, id="again"), records=run.records[:1])
    (found,) = experiments([again, run])
    assert list(found.runs) == [run]


def test_of_equal_runs_of_a_seed_the_last_one_counts_and_none_that_failed(experiment, tmp_path):
    (run, *_) = experiment.stochastic[0].runs
    shutil.copytree(run.run.path, tmp_path / "later")
    edit_description(tmp_path / "later", lambda described: described.update(created="9"))
    shutil.copytree(run.run.path, tmp_path / "failed")
    (tmp_path / "failed" / layout.FAILED).write_text("the loss is nan\n")
    later, failed = (read_run(tmp_path / name) for name in ("later", "failed"))
    under_way = replace(run, records=run.records[:1])
    assert distinct([run, later]) == distinct([later, run]) == [later]
    assert distinct([failed, under_way]) == [under_way]


def test_a_kind_whose_runs_all_failed_does_not_hold_up_the_others(experiment, tmp_path):
    constant, stochastic = experiment.series
    failed = tmp_path / "failed"
    failed.mkdir()
    (failed / layout.FAILED).write_text("the loss is nan\n")
    (run, *_) = stochastic.runs
    broken = replace(
        run, run=replace(run.run, path=failed), records=run.records[:1], finished=False
    )
    other = replace(
        stochastic,
        name="uniform 0.1",
        survival=replace(stochastic.survival, rule="uniform", final=0.1),
        runs=(broken,),
    )
    now = replace(experiment, series=(constant, stochastic, other)).comparable()
    assert now == experiment.comparable()
    assert now.progress == ""
    alone = replace(experiment, series=(other,))
    assert [one.records for one in alone.comparable().runs] == [run.records[:1]]


def test_each_series_is_named_by_what_is_not_the_default(experiment):
    (paper,) = experiment.stochastic[0].runs[:1]
    names = {
        "linear decay to 0.5": {},
        "linear decay to 0.5, gate sample": {"gate": "sample"},
        "linear decay to 0.5, gate subset, balanced": {"gate": "subset", "balance": True},
        "linear decay to 0.5, early until 0.5 linear": {"schedule": ScheduleConfig("early")},
        "uniform 0.5, skipped freeze": {"rule": "uniform", "skipped": "freeze"},
    }
    runs = []
    for changes in names.values():
        survival = replace(paper.run.config.survival, **changes)
        run = replace(paper.run, config=replace(paper.run.config, survival=survival))
        runs.append(replace(paper, run=run))
    (together,) = experiments(runs)
    assert {series.name for series in together.stochastic} == names.keys()


def test_the_headline_is_of_the_paper_or_of_what_differs_in_fewest_settings(experiment):
    (constant, paper) = experiment.series
    forward_only, decreasing, distant, everything = (
        replace(paper, survival=replace(paper.survival, **changes))
        for changes in (
            {"closed": "forward-only"},
            {"schedule": ScheduleConfig(kind="decreasing")},
            {"rule": "uniform", "final": 0.9},
            {"rule": "uniform", "final": 0.9, "balance": True, "skipped": "freeze"},
        )
    )

    def headline(*series):
        return replace(experiment, series=series).main

    others = (everything, distant, decreasing, forward_only)
    for order in (others, others[::-1]):
        assert headline(constant, *order, paper) is paper
        assert headline(constant, paper, *order) is paper
    assert headline(constant, everything, distant) is distant
    assert headline(constant, everything, distant, forward_only) is forward_only
    assert headline(constant) is constant
