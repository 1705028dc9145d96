import os
import pickle
import subprocess
import sys

import pytest
import torch

from stochastic_depth.errors import CheckpointError
from stochastic_depth.train import checkpoint
from stochastic_depth.train.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from support.runs import STATE


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "c.ckpt", STATE)
    return tmp_path / "c.ckpt"


def test_what_was_saved_comes_back(path):
    state = load_checkpoint(path, "a")
    assert torch.equal(state["weights"], STATE["weights"])
    assert state["nested"] == STATE["nested"]


def test_a_checkpoint_of_another_run_is_refused(path):
    with pytest.raises(CheckpointError, match="another run"):
        load_checkpoint(path, "b")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_foreign_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "evil.ckpt", {"run": "a", "evil": Malicious()})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "evil.ckpt", "a")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "bare.ckpt", "a")
    assert not (tmp_path / "executed").exists()


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a", keep=2)
    for step in range(1, 8):
        checkpoints.save(step, best=3 if step >= 3 else step, state={})
    assert checkpoints.steps() == [7, 6, 3]


def test_the_newest_that_can_be_trusted_is_used_and_the_others_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, best=None, state={})
    checkpoints.path(3).write_bytes(b"")
    checkpoints.path(2).write_bytes(checkpoints.path(2).read_bytes()[:-1])
    state, refused = checkpoints.newest("cpu")
    assert state["step"] == 1
    assert len(refused) == 2
    assert str(checkpoints.path(3)) in refused[0]


def test_the_last_good_checkpoint_is_one_that_can_be_trusted(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, "a", keep=9)
    assert checkpoints.last_good() == "there is no good checkpoint before it"
    for step in (8, 10, 16):
        checkpoints.save(step, best=None, state={})
    for step in (10, 16):
        checkpoints.path(step).write_bytes(checkpoints.path(step).read_bytes()[:-1])

    def full(*_):
        raise CheckpointError("no room")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    for step in (12, 16):
        with pytest.raises(CheckpointError, match=r"^no room; the last .* is \S+step-000000008"):
            checkpoints.save(step, None, {})


LITTLE_MEMORY = """
import resource, sys, torch
from pathlib import Path
from stochastic_depth.train.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), "a", keep=1)
checkpoints.save(1, None, {"x": torch.zeros(30_000_000)})
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 30_000_000, resource.RLIM_INFINITY))
print(checkpoints.last_good())
"""


def test_the_last_good_checkpoint_is_named_where_memory_has_run_out(tmp_path):
    command = [sys.executable, "-c", LITTLE_MEMORY, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("step-000000001.ckpt")


def test_no_trusted_checkpoint_at_all_is_an_error_and_not_a_fresh_start(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a", keep=1)
    checkpoints.save(1, best=None, state={})
    checkpoints.path(1).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint can be trusted"):
        checkpoints.newest("cpu")


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from stochastic_depth.errors import CheckpointError
from stochastic_depth.train import checkpoint
from stochastic_depth.train.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]), "a", keep=1)
checkpoints.save(1, None, {"x": torch.zeros(100)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoints.save(2, None, {"x": torch.zeros(100_000)})
except CheckpointError as error:
    print(error)
    sys.exit(3)
"""


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 3, done.stderr
    assert "step-000000002.ckpt could not be written" in done.stdout
    assert f"the last good checkpoint is {tmp_path}/step-000000001.ckpt" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001.ckpt"]
    assert load_checkpoint(tmp_path / "step-000000001.ckpt", "a")["step"] == 1
