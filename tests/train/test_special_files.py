"""A run folder from somebody else: whatever it links to, nothing of the user's is touched."""

import os
import shutil
import subprocess
import sys

import pytest

from stochastic_depth.cli import main
from stochastic_depth.errors import CheckpointError, DataError, RunError
from stochastic_depth.train import begin, fit, open_run, reopen, trained_model
from stochastic_depth.train.run_folder import remove_untrained_on_error
from support.runs import assert_same_end, finish
from support.special_files import KINDS, put

pytestmark = pytest.mark.usefixtures("one_thread")

FILES = (
    "config.json",
    "metrics.jsonl",
    "lock",
    "model.safetensors",
    "checkpoints/step-000000016.ckpt",
)

COMMANDS = ("train --resume", "eval", "export", "analyze pruning", "report")


@pytest.fixture
def copied(finished, path):
    """A copy of a run that has ended, without its last checkpoint: resuming does some steps."""
    shutil.copytree(finished, path)
    newest = max((path / "checkpoints").iterdir())
    newest.unlink()
    (path / "model.safetensors").unlink()
    return path


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis").write_bytes(b"{}\n" * 5000)
    return folder / "thesis"


def replaced(run, name, kind, mine):
    (run / name).unlink(missing_ok=True)
    return put(run / name, kind, mine)


@pytest.mark.parametrize("kind", KINDS)
def test_a_journal_is_not_written_through_a_link(finished, path, mine, kind, silent):
    """As a folder would be made for somebody who resumes it: nothing to read, all to write."""
    shutil.copytree(finished, path)
    for name in ("metrics.jsonl", "model.safetensors", "checkpoints"):
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    put(path / "metrics.jsonl", kind, mine)
    before = mine.read_bytes()
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be read: it is a (link|pipe)"):
        list(fit(*reopen(path), silent))
    assert mine.read_bytes() == before
    assert os.listdir(mine.parent) == ["thesis"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_a_run_is_used_through_a_link_a_pipe_or_a_device(
    copied, name, kind, mine, silent
):
    replaced(copied, name, kind, mine)
    before = mine.read_bytes()
    try:
        list(fit(*reopen(copied), silent))
    except RunError as error:
        shown = str(error)
    else:
        shown = silent.said[0]
    assert name.rpartition("/")[2] in shown
    assert "expected a regular file: remove it" in shown
    assert mine.read_bytes() == before
    assert os.listdir(mine.parent) == ["thesis"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_in_the_way_is_removed_and_the_run_goes_on(copied, kind, mine, silent, small):
    """The remedy that the error names."""
    lock = replaced(copied, "lock", kind, mine)
    with pytest.raises(RunError, match=f"{lock} cannot be used: .*: remove it"):
        list(fit(*reopen(copied), silent))
    lock.unlink()
    list(fit(*reopen(copied), silent))
    other, _ = finish(copied.with_name("other"), small, silent)
    assert_same_end(open_run(copied), other)


def test_weights_that_cannot_be_written_again_are_not_said_to_be(finished, path, silent):
    shutil.copytree(finished, path)
    (path / "model.safetensors").unlink()
    os.mkfifo(path / "model.safetensors")
    with pytest.raises(RunError, match="could not be written"):
        list(fit(*reopen(path), silent))
    assert silent.said == []


def test_a_folder_of_checkpoints_that_is_a_link_is_refused(copied, silent):
    elsewhere = copied.with_name("elsewhere")
    (copied / "checkpoints").rename(elsewhere)
    (copied / "checkpoints").symlink_to(elsewhere)
    (elsewhere / ".unfinished-mine").write_bytes(b"mine")
    before = sorted(os.listdir(elsewhere))
    run, images = reopen(copied)
    with pytest.raises(RunError, match="checkpoints is a link or a file, expected a folder"):
        list(fit(run, images, silent))
    with pytest.raises(CheckpointError, match="checkpoints is a link or a file"):
        trained_model(run, images)
    assert sorted(os.listdir(elsewhere)) == before


def test_data_that_cannot_be_read_is_told_for_an_untrained_run_behind_a_link(small, path):
    begin(small, path)
    before = sorted(os.listdir(path))
    (link := path.with_name("link")).symlink_to(path)
    with pytest.raises(DataError, match="broken"), remove_untrained_on_error([open_run(link)]):
        raise DataError("broken")
    assert sorted(os.listdir(path)) == before
    with pytest.raises(DataError, match="broken"), remove_untrained_on_error([open_run(path)]):
        raise DataError("broken")
    assert not path.exists()


def test_a_journal_or_a_lock_with_a_second_name_is_not_changed(copied, tmp_path, silent):
    for name in ("metrics.jsonl", "lock"):
        os.link(copied / name, tmp_path / name)
        before = (tmp_path / name).read_bytes()
        with pytest.raises(RunError, match=f"{name} .*it is a hard link.*put a copy in its place"):
            list(fit(*reopen(copied), silent))
        assert (tmp_path / name).read_bytes() == before
        content = (copied / name).read_bytes()  # the remedy
        (copied / name).unlink()
        (copied / name).write_bytes(content)
    assert list(fit(*reopen(copied), silent))


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "checkpoints/step-000000020.ckpt"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_a_run_refuses_what_is_no_file(
    finished, path, mine, kind, name, command, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, path)
    assert (path / name).is_file()
    replaced(path, name, kind, mine)
    code = main([*command.split(), str(path)])
    shown = capsys.readouterr()
    if name.startswith("checkpoints") and command == "report":
        assert code == 0  # which reads no checkpoint
    elif name.startswith("checkpoints") and command == "train --resume":
        assert f"it is a {kind}, expected a regular file: remove it; using the one" in shown.out
        assert code == (kind == "pipe")  # which nothing is written over
    else:
        assert code == 1
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert f"it is a {kind}, expected a regular file: remove it" in shown.err
    assert mine.read_bytes() == b"{}\n" * 5000


def test_a_pipe_among_the_checkpoints_does_not_keep_a_process_from_ending(copied, mine):
    for checkpoint in (copied / "checkpoints").iterdir():
        checkpoint.unlink()
        put(checkpoint, "pipe", mine)
    done = subprocess.run(
        [sys.executable, "-m", "stochastic_depth", "train", "--resume", str(copied)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "no checkpoint can be trusted" in done.stderr
    assert "it is a pipe, expected a regular file" in done.stderr
