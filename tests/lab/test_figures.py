import csv
import io
import itertools
import re
import statistics
from dataclasses import replace
from types import SimpleNamespace

import altair as alt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stochastic_depth.lab.active_blocks_chart import active_blocks_figure, drop_rates_figure
from stochastic_depth.lab.bench.depth_chart import depth_cost
from stochastic_depth.lab.charts import Figure, _ticks, log_axis
from stochastic_depth.lab.drawing import file_svg
from stochastic_depth.lab.ensemble_chart import ensemble_figure
from stochastic_depth.lab.gradients_chart import block_gradients
from stochastic_depth.lab.outcomes import RunOutcome
from stochastic_depth.lab.pruning_chart import _sentence, pruned_blocks
from stochastic_depth.lab.recorded import read_sources
from stochastic_depth.lab.sweep import charts
from stochastic_depth.lab.training_curves import training_curves, training_time
from stochastic_depth.train.schedule_config import ScheduleConfig


def test_curves_hold_every_number_of_the_journals(experiment):
    rows = training_curves(experiment).rows
    shown = {(row["run"], row["epoch"]): row["test_error"] for row in rows}
    journals = {
        (run.name, record.epoch): record.test_error
        for run in experiment.runs
        for record in run.records
    }
    assert shown == journals
    assert len(shown) == 2 * 2 * 2


def test_curves_tell_mean_and_every_seed_at_a_point(experiment):
    values = _values(training_curves(experiment), "label")
    series = experiment.stochastic[0]
    errors = sorted(run.records[-1].test_error for run in series.runs)
    seen = ", ".join(f"{error:.2f} %" for error in errors)
    mean = f"{statistics.fmean(errors):.2f} %"
    assert f"stochastic depth, epoch 2: {mean}, mean of {seen}" in values


def test_drops_of_the_learning_rate_are_marked(experiment):
    panel = training_curves(experiment).panels[0]
    assert panel.layer[0].mark.type == "rule"
    assert [row["x"] for row in _rows(panel, 0)] == [1.0, 1.5]


def test_the_time_tells_what_the_flops_promise(experiment):
    constant, stochastic = experiment.series
    figure = training_time(experiment)
    median = statistics.median(r.seconds for run in constant.runs for r in run.records)
    expected = _rows(figure.panels[0], 2)
    assert [row["x"] for row in expected] == [pytest.approx(median * (1 - stochastic.cost.saving))]


def test_a_block_that_was_never_open_has_no_gradient(experiment):
    figure = block_gradients(experiment)
    assert [panel.title for panel in figure.panels] == ["Epoch 1", "Epoch 2"]
    shown = {row["x"] for row in _rows(figure.panels[0], 0)}
    assert shown == {1, 2, 3, 4, 5}
    assert {row["gradient"] for row in figure.rows if row["block"] == 6} == {None}


@pytest.mark.parametrize(
    ("last", "epochs", "sentence"),
    [
        ([None] * 6, ["Epoch 1"], "At epoch 1 the gradient is 0.2 times as strong at block 5"),
        ([0.1, *[None] * 5], ["Epoch 1", "Epoch 2"], "At epoch 2 fewer than two blocks have a "),
    ],
)
def test_epochs_are_shown_that_have_gradients_of_blocks(experiment, last, epochs, sentence):
    def changed(run, n, gradients):
        records = list(run.records)
        records[n] = replace(records[n], block_gradients=gradients)
        return replace(run, records=tuple(records))

    figure = block_gradients(experiment._of(lambda run: changed(run, -1, last)))
    assert [panel.title for panel in figure.panels] == epochs
    assert figure.sentence.startswith(sentence)
    (run, *_) = experiment.runs
    apart = experiment._of(lambda other: changed(other, 0 if other is run else -1, [None] * 6))
    assert block_gradients(apart) is None


def test_active_blocks_are_counted_over_seeds_and_epochs(experiment):
    figure = active_blocks_figure(experiment.stochastic[0])
    assert {row["active_blocks"]: row["steps"] for row in figure.rows} == {
        **dict.fromkeys(range(7), 0),
        3: 8,
        4: 20,
        5: 12,
    }
    assert sum(row["probability"] for row in figure.rows) == pytest.approx(1)
    assert "on average 4.10 of 6 blocks ran, where 4.25 are expected" in figure.sentence


@pytest.mark.parametrize(
    "settings", [{"balance": True}, {"schedule": ScheduleConfig("early", until=0.5)}]
)
def test_active_blocks_of_balanced_gates_and_under_a_schedule_are_drawn(experiment, settings):
    series = experiment.stochastic[0]
    survival = replace(series.survival, **settings)
    runs = tuple(
        replace(run, run=replace(run.run, config=replace(run.run.config, survival=survival)))
        for run in series.runs
    )
    figure = active_blocks_figure(replace(series, survival=survival, runs=runs))
    chances = [row["probability"] for row in figure.rows]
    assert sum(chances) == pytest.approx(1)
    if survival.balance:
        assert {n: p for n, p in enumerate(chances) if p} == pytest.approx({4: 0.75, 5: 0.25})
    else:
        assert chances[6] > 0.5  # no block is dropped in the second half


def test_gates_for_single_samples_have_no_count_of_blocks(experiment):
    series = experiment.stochastic[0]
    assert (
        active_blocks_figure(replace(series, survival=replace(series.survival, gate="sample")))
        is None
    )


def test_drop_rates_over_time_are_drawn_where_they_follow_a_schedule(experiment):
    assert drop_rates_figure(experiment) is None
    early = ScheduleConfig("early", until=0.5)
    (stochastic,) = experiment.stochastic
    survival = replace(stochastic.survival, schedule=early)
    changed = tuple(
        replace(series, survival=survival) if series is stochastic else series
        for series in experiment.series
    )
    figure = drop_rates_figure(replace(experiment, series=changed))
    journal = stochastic.runs[0].records
    assert [row["drop_rate"] for row in figure.rows] == [
        pytest.approx(1 - record.expected_active_blocks / 6) for record in journal
    ]
    assert "(early)" in figure.sentence
    assert b"<svg" in file_svg("title", figure)


def test_the_ensemble_has_a_panel_for_each_measure(experiment):
    figure = ensemble_figure(experiment.stochastic[0])
    assert len(figure.panels) == 3
    assert len(figure.rows) == 2 * 10
    assert "scaled by p_l has 5.00 % error and 0.500 nats; the mean of 64" in figure.sentence


def test_what_the_last_blocks_are_worth_is_said(experiment):
    figure = pruned_blocks(experiment)
    # 5 exp(k / 2) is above 9.75 from k = 2 on
    of_each = "(5.00 % error with all blocks) keeps 95 % of its accuracy without its last block"
    assert figure.sentence == f"Constant depth {of_each}; stochastic depth {of_each}."


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (
            [47.0, 50.0, 60.0],
            "(47.00 % error with all blocks) keeps less than 95 % of its accuracy",
        ),
        ([47.0, 48.0, 49.0], "keeps 95 % of its accuracy without its last 4 blocks"),
        ([47.0, 60.0, 49.0], "keeps less than 95 % of its accuracy without its last 2 blocks"),
    ],
)
def test_a_network_that_needs_its_last_blocks_is_said_to_need_them(errors, said):
    rows = [
        {
            "series": "constant depth",
            "order": "last",
            "recalibrated": "as trained",
            "removed": 2 * place,
            "error": error,
        }
        for place, error in enumerate(errors)
    ]
    assert said in _sentence([SimpleNamespace(name="constant depth")], rows)


def test_blocks_count_from_one_and_no_block_is_an_empty_cell(experiment):
    rows = list(csv.DictReader(io.StringIO(pruned_blocks(experiment).csv())))
    blocks = {row["removed"]: row["blocks"] for row in rows}
    assert (blocks["0"], blocks["2"], blocks["6"]) == ("", "5 6", "1 2 3 4 5 6")


def test_without_data_there_is_no_figure(experiment):
    bare = replace(
        experiment,
        series=tuple(
            replace(
                series,
                runs=tuple(
                    replace(
                        run,
                        run=replace(run.run, path=run.run.path / "elsewhere"),
                        records=tuple(
                            replace(r, block_gradients=[], active_counts={}) for r in run.records
                        ),
                    )
                    for run in series.runs
                ),
            )
            for series in experiment.series
        ),
    )
    assert block_gradients(bare) is None
    assert pruned_blocks(bare) is None
    assert active_blocks_figure(bare.stochastic[0]) is None
    assert ensemble_figure(bare.stochastic[0]) is None


def test_a_survival_sweep_has_the_finished_runs_by_rule_and_p(survival_sweep):
    (sweep,) = read_sources([survival_sweep]).sweeps
    figure = charts.survival_sweep(sweep)
    assert {(row["rule"], row["p_L"]) for row in figure.rows} == {
        ("linear", 0.5),
        ("linear", 1.0),
        ("uniform", 0.5),
        ("uniform", 1.0),
        ("constant", 1.0),
    }
    unfinished = replace(sweep, runs=tuple(replace(run, finished=False) for run in sweep.runs))
    assert charts.survival_sweep(unfinished) is None


def test_a_sweep_of_gates_has_the_errors_of_the_finished_runs_by_gating(gates_sweep):
    (sweep,) = read_sources([gates_sweep]).sweeps
    figure = charts.gates_sweep(sweep)
    assert figure is not None
    errors = {row["gating"]: row["test_error"] for row in figure.rows}
    assert errors == {
        "constant" if "constant" in run.name else "batch": RunOutcome.of(
            run.records
        ).test_error_best
        for run in sweep.runs
    }
    assert "constant" in figure.sentence
    constant = replace(sweep, runs=tuple(run for run in sweep.runs if "constant" in run.name))
    only = charts.gates_sweep(constant)
    assert only is not None
    assert [row["gating"] for row in only.rows] == ["constant"]
    assert charts.gates_sweep(replace(sweep, runs=())) is None


def test_a_depth_sweep_has_a_cell_for_each_depth_and_p(depth_sweep):
    (sweep,) = read_sources([depth_sweep]).sweeps
    figure = charts.depth_sweep(sweep)
    cells = _rows(figure.panels[0], 0)
    assert {(cell["depth"], cell["p"]) for cell in cells} == set(
        itertools.product((8, 14), (0.5, 1.0))
    )
    lowest = min(row["test_error"] for row in figure.rows)
    assert f"The lowest error, {lowest:.2f} %" in figure.sentence


def test_the_cost_of_depth_is_told_in_the_slope(benchmark_file):
    (result,) = read_sources([benchmark_file]).benchmarks
    figure = depth_cost(result)
    assert "Each layer more costs 100 µs with constant depth" in figure.sentence
    assert "at 56 layers stochastic depth saves 25.0 % of the time" in figure.sentence


@given(st.floats(1e-9, 1e6), st.floats(1.5, 1e9))
def test_a_logarithmic_axis_has_round_numbers_within_its_ends(low, factor):
    ticks = _ticks(low, low * factor)
    assert 2 <= len(ticks) <= 8
    assert all(low <= tick <= low * factor for tick in ticks)
    assert ticks == sorted(ticks)


def test_over_a_narrow_range_the_marks_have_equal_distances():
    marks = [0.0095, 0.01, 0.0105, 0.011, 0.0115, 0.012, 0.0125, 0.013]
    assert _ticks(0.0093, 0.0131) == marks


POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)


@given(st.lists(POSITIVE, min_size=1, max_size=3))
@example([1.35e-3])
@example([10.45])
@example([2.25])
@example([13.5, 13.6])
@example([9.5])
@example([1e-323])
@example([2e-322])
def test_every_positive_number_is_on_a_logarithmic_axis_with_a_mark(values):
    axis = log_axis(values, "").to_dict()
    low, high = axis["scale"]["domain"]
    assert low <= min(values) <= max(values) <= high
    assert 1 <= len(axis["axis"]["values"]) <= 8
    assert all(low <= tick <= high for tick in axis["axis"]["values"])


def test_figures_below_each_other_have_the_marks_of_both(experiment):
    drawn = file_svg("title", training_curves(experiment), training_time(experiment))
    # of two kinds, two epochs: the means in two panels, and a stroke for each of two seeds
    assert len(re.findall(rb'aria-label="[^"]*, epoch [12]: ', drawn)) == 8 + 8
    assert b"NaN" not in drawn


def test_data_as_csv_has_every_row_and_no_formula():
    rows = [{"run": '=HYPERLINK("x")', "y": -1.5}, {"run": 'a "b", c', "y": None}]
    text = Figure("id", "title", "", rows, ()).csv()
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"run": '\'=HYPERLINK("x")', "y": "-1.5"},
        {"run": 'a "b", c', "y": ""},
    ]


def _values(figure: Figure, column: str) -> set[str]:
    return {
        row[column]
        for panel in figure.panels
        for layer in range(len(panel.layer))
        for row in _rows(panel, layer)
        if column in row
    }


def _rows(panel, layer: int) -> list[dict]:
    """What a layer draws; Altair keeps what all layers share with the panel."""
    own = panel.layer[layer].data
    return (panel.data if own is alt.Undefined else own).values


def test_the_times_of_unfinished_runs_are_of_equal_epochs(experiment):
    def unfinished(series, *more):
        runs = (replace(r, finished=False, records=(*r.records, *more)) for r in series.runs)
        return replace(series, runs=tuple(runs))

    constant, stochastic = experiment.series
    later = replace(stochastic.runs[0].records[-1], epoch=9.0, seconds=1e6)
    equal = replace(experiment, series=(unfinished(constant), unfinished(stochastic)))
    apart = replace(experiment, series=(unfinished(constant), unfinished(stochastic, later)))
    assert training_time(apart).sentence == training_time(equal).sentence
