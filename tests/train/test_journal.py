import os
import shutil

import pytest

from stochastic_depth.cli import main
from stochastic_depth.errors import RunError
from stochastic_depth.train import fit, reopen
from stochastic_depth.train.journal import (
    best_record,
    read_journal,
    truncate_journal,
)
from support.runs import append_records, last_checksum, record


@pytest.fixture
def journal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_records(path, "a", [record(1), record(2), record(3)])
    return path


def test_records_come_back_in_order(journal):
    assert read_journal(journal, "a") == [record(1), record(2), record(3)]


def test_a_new_journal_and_each_line_are_on_disk_with_their_folder(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.fstat(file)), fsync(file)))
    path = tmp_path / "metrics.jsonl"
    append_records(path, "a", [record(1), record(2)])
    expected = [path.stat(), tmp_path.stat(), path.stat()]
    assert [found.st_ino for found in synced] == [found.st_ino for found in expected]


def test_a_line_that_is_still_being_written_is_left_out(journal):
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole[: len(whole) // 6])
    assert read_journal(journal, "a") == [record(1), record(2), record(3)]


def edited(lines):
    return [lines[0], lines[1].replace(b'"test_error": 0.5', b'"test_error": 0.1'), lines[2]]


CHANGES = {
    "edited": (2, edited),
    "line ends": (1, lambda lines: [line[:-1] + b"\r\n" for line in lines]),
    "repeated": (2, lambda lines: [lines[0], *lines]),
    "repeated at the end": (4, lambda lines: [*lines, lines[2]]),
    "one is missing": (2, lambda lines: [lines[0], lines[2]]),
    "in another order": (1, lambda lines: [lines[1], lines[0], lines[2]]),
    "an empty line": (2, lambda lines: [lines[0], b"\n", *lines[1:]]),
    "joined": (1, lambda lines: [lines[0][:-1], *lines[1:]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_lines_that_were_changed_are_not_read_and_nothing_is_cut(journal, change):
    number, changed = CHANGES[change]
    last = last_checksum(journal, "a")
    journal.write_bytes(b"".join(changed(journal.read_bytes().splitlines(keepends=True))))
    before = journal.read_bytes()
    with pytest.raises(RunError, match=f"line {number} is not a record as this run wrote it"):
        read_journal(journal, "a")
    for kept in ("a", last):
        with pytest.raises(RunError, match=f"line {number} is not a record as this run wrote it"):
            truncate_journal(journal, "a", kept)
    assert journal.read_bytes() == before


def test_the_journal_of_another_run_is_not_read(journal):
    with pytest.raises(RunError, match="line 1 is not a record as this run wrote it"):
        read_journal(journal, "b")


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_work_after_the_checkpoint_is_dropped(tmp_path, kept):
    path = tmp_path / "metrics.jsonl"
    append_records(path, "a", [record(step) for step in range(kept)])
    last = last_checksum(path, "a")
    append_records(path, "a", [record(9), record(10)])
    with path.open("ab") as file:
        file.write(b'{"step": 3, "ep')
    truncate_journal(path, "a", last)
    assert read_journal(path, "a") == [record(step) for step in range(kept)]
    assert path.read_bytes().count(b"\n") == kept


def test_a_journal_that_lost_lines_is_an_error(journal, tmp_path):
    last = last_checksum(journal, "a")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:2]))
    for path in (journal, tmp_path / "missing"):
        with pytest.raises(RunError, match="lines are missing"):
            truncate_journal(path, "a", last)
    assert journal.read_bytes() == b"".join(lines[:2])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.replace(b"\n", b"\r\n"),
        lambda content: content + content.splitlines(keepends=True)[-1],
        lambda content: content.replace(b'"test_error": ', b'"test_error": 1'),
        lambda content: b"".join(content.splitlines(keepends=True)[:-1]),
    ],
)
def test_a_finished_run_loses_nothing_of_a_changed_journal(finished, tmp_path, silent, change):
    path = shutil.copytree(finished, tmp_path / "run")
    changed = change((path / "metrics.jsonl").read_bytes())
    (path / "metrics.jsonl").write_bytes(changed)
    with pytest.raises(RunError, match=r"is not a record as this run|lines are missing"):
        list(fit(*reopen(path), silent))
    assert (path / "metrics.jsonl").read_bytes() == changed


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("command", [["eval"], ["report"], ["analyze", "gradients"]])
def test_edited_results_are_not_shown(finished, tmp_path, capsys, command):
    path = shutil.copytree(finished, tmp_path / "run")
    journal = path / "metrics.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"test_error": ', b'"test_error": 1'))
    assert main([*command, str(path)]) == 1
    assert "metrics.jsonl, line 1 is not a record as this run wrote it" in capsys.readouterr().err


def test_the_best_record_has_the_lowest_validation_error_and_is_the_earliest_of_equals():
    assert best_record([record(1, 3.0), record(2, 2.0), record(3, 2.0)]).step == 2
