import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.train.journal import (
    append_record,
    best_record,
    read_journal,
    truncate_journal,
)
from support.runs import record


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_record(path, record(step))
    assert read_journal(path) == [record(1), record(2), record(3)]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, record(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert read_journal(path) == [record(1)]


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, record(1))
    with path.open("ab") as file:
        file.write(b'{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2 is not a record"):
        read_journal(path)


def test_work_after_the_checkpoint_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, record(1))
    length = path.stat().st_size
    append_record(path, record(2))
    truncate_journal(path, length)
    assert read_journal(path) == [record(1)]


def test_a_journal_that_lost_lines_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, record(1))
    with pytest.raises(RunError, match="lines are missing"):
        truncate_journal(path, path.stat().st_size + 1)
    with pytest.raises(RunError, match="lines are missing"):
        truncate_journal(tmp_path / "missing", 1)


def test_the_best_record_has_the_lowest_validation_error_and_is_the_earliest_of_equals():
    assert best_record([record(1, 3.0), record(2, 2.0), record(3, 2.0)]).step == 2
