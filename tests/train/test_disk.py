"""A disk that is full, or cannot be written: one sentence, nothing lost, and on when there is room.

On a real file system of a few megabytes.
"""

import os
import shutil
import subprocess

import pytest
import torch

from stochastic_depth.cli import main
from stochastic_depth.errors import CheckpointError, RunError
from stochastic_depth.train import begin, fit, reopen
from stochastic_depth.train.checkpoint import load_checkpoint, save_checkpoint
from stochastic_depth.train.journal import read_journal
from support.runs import append_records, assert_same_end, finish, record

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk, leave: int = 0) -> None:
    """Take all the room there is but `leave` bytes."""
    free = shutil.disk_usage(disk).free - leave
    (disk / "filler").write_bytes(bytes(free))


def make_room(disk) -> None:
    (disk / "filler").unlink()


def test_a_checkpoint_that_does_not_fit_leaves_nothing_and_the_one_before(disk):
    save_checkpoint(disk / "a.ckpt", {"run": "x", "step": 1})
    fill(disk, leave=8192)
    with pytest.raises(CheckpointError, match=r"b\.ckpt .*No space left on device; make room"):
        save_checkpoint(disk / "b.ckpt", {"run": "x", "step": 2, "w": torch.zeros(10_000)})
    assert {path.name for path in disk.iterdir()} == {"a.ckpt", "filler"}
    assert load_checkpoint(disk / "a.ckpt", "x")["step"] == 1


def test_a_journal_has_whole_lines_only_however_little_room_there_is(disk):
    path = disk / "metrics.jsonl"
    append_records(path, "a", [record(0)])
    fill(disk)
    # The system gives room by the page, so the line that does not fit is written in part first.
    with pytest.raises(RunError, match="No space left on device; make room"):
        append_records(path, "a", map(record, range(1, 100)))
    written = len(read_journal(path, "a"))
    assert 1 < written < 100
    assert path.read_bytes().endswith(b"}\n")
    make_room(disk)
    append_records(path, "a", [record(written)])
    assert [r.step for r in read_journal(path, "a")] == list(range(written + 1))


@pytest.mark.parametrize(
    ("records", "leave", "file"),
    [
        (0, 0, "metrics.jsonl"),
        (0, 65536, "step-000000004.ckpt"),
        (2, 65536, "step-000000012.ckpt"),
        (5, 65536, "model.safetensors"),
    ],
)
def test_a_run_stops_with_a_sentence_and_goes_on_when_there_is_room(
    records, leave, file, small, disk, silent, tmp_path
):
    run, images = begin(small, disk / "run")
    under_way = fit(run, images, silent)
    for _ in range(records):
        next(under_way)
    fill(disk, leave)
    with pytest.raises(RunError, match=rf"{file} could not be written: No space left .* make room"):
        list(under_way)
    assert len(run.records()) in (records, records + 1)
    assert not list(run.path.rglob(".unfinished-*"))
    for step in run.checkpoints.steps():
        assert run.checkpoints.load(step, "cpu")["step"] == step
    make_room(disk)
    list(fit(*reopen(run.path), silent))
    assert_same_end(run, finish(tmp_path / "other", small, silent)[0])


def test_no_folder_is_left_where_a_run_cannot_be_made(small, disk):
    fill(disk)
    with pytest.raises(
        RunError, match=r"run cannot be created: No space left on device; make room"
    ):
        begin(small, disk / "run")
    assert [path.name for path in disk.iterdir()] == ["filler"]


def test_a_run_that_cannot_be_written_is_told_and_can_still_be_evaluated(
    small, disk, silent, capsys
):
    run, _ = finish(disk / "run", small, silent)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(RunError, match="run cannot be written: Read-only file system"):
        next(fit(*reopen(run.path), silent))
    assert main(["train", "--resume", str(run.path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert main(["eval", str(run.path)]) == 0
