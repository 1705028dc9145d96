import dataclasses
from dataclasses import replace

import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.lab.gradients import gradients, record_at, spread_epochs
from stochastic_depth.lab.recorded import RecordedRun, read_run
from stochastic_depth.train import Record, Run


def run_with(like: Run, path, records) -> RecordedRun:
    return RecordedRun(replace(like, path=path), tuple(records), finished=False)


def record(step, epoch, mean, blocks):
    values = {field.name: 0.5 for field in dataclasses.fields(Record)}
    shown = {"step": step, "epoch": epoch, "gradient_mean": mean, "block_gradients": blocks}
    return Record(**{**values, **shown, "active_counts": {}})


@pytest.fixture
def two(pairs, tmp_path):
    """Two seeds with journals written by hand; the second one has gone on for longer."""
    like = pairs["stochastic"][0]
    first = [record(10, 1.0, 2.0, [1.0, None, None]), record(20, 2.0, 4.0, [3.0, 5.0, None])]
    second = [record(10, 1.0, 3.0, [2.0, 6.0, None]), record(20, 2.0, 8.0, [7.0, 7.0, 8.0])]
    second.append(record(30, 3.0, 1.0, [0.0, 0.0, 0.0]))
    return [
        run_with(like, tmp_path / name, records) for name, records in (("a", first), ("b", second))
    ]


def test_gradients_are_means_over_seeds_and_over_the_seeds_that_have_one(two):
    found = gradients(two, [1.0, 2.0])
    assert [spread.mean for spread in found.first] == [2.5, 6.0]
    assert found.first[0].deviation == pytest.approx(0.5**0.5)
    assert found.blocks == [[1.5, 6.0, None], [5.0, 6.0, 8.0]]


def test_an_epoch_is_one_of_the_journal(two):
    assert record_at(two[0], 1).step == 10
    for epoch in (0, 1.5, 3):
        with pytest.raises(RunError, match=f"a has no epoch {epoch} in its journal: .* 1, 2$"):
            record_at(two[0], epoch)


def test_an_epoch_that_is_no_whole_number_is_given_as_it_is_shown(two, tmp_path):
    thirds = [record(step, step / 3, 1.0, []) for step in range(1, 13)]
    run = run_with(two[0].run, tmp_path / "thirds", thirds)
    assert record_at(run, float("0.33")).step == 1
    with pytest.raises(RunError, match=r"from 0.33, 0.67, 1, ..., 4$"):
        record_at(run, 0.3)


def test_of_records_that_are_shown_alike_the_nearest_is_given(two, tmp_path):
    close = [record(step, step / 1000, 1.0, []) for step in range(1, 13)]
    run = run_with(two[0].run, tmp_path / "close", close)
    assert [record_at(run, epoch).step for epoch in (0.005, 0.007, 0.0072, 0.01)] == [5, 7, 7, 10]


def test_epochs_that_are_not_chosen_are_spread_over_what_all_runs_have(two, pairs):
    assert spread_epochs(two) == [1.0, 2.0]
    assert spread_epochs(two[1:], 2) == [1.0, 3.0]
    assert spread_epochs([read_run(pairs["constant"][0].path)]) == [1, 2, 3, 4]


def test_networks_without_blocks_have_no_gradients_of_blocks(two):
    plain = replace(two[0].records[0], block_gradients=[])
    assert gradients([replace(two[0], records=(plain,))], [1.0]).blocks == [[]]
