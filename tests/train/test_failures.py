"""What a run says when it cannot go on, and what it does not mind."""

import dataclasses
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.data import folder_batches
from stochastic_depth.draw import draw
from stochastic_depth.errors import DivergedError, OutOfMemoryError, RunError
from stochastic_depth.train import DataConfig, ModelConfig, SurvivalConfig, begin, fit, reopen
from stochastic_depth.train.failures import open_blocks
from stochastic_depth.train.train_state import TrainState
from support.data_sets import write_imagenet
from support.processes import environment
from support.runs import assert_same_end, finish

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("gates", "shown"),
    [
        ("1", "blocks 1 of 1 open"),
        ("0", "none of 1 blocks open"),
        ("111011", "blocks 1-3, 5-6 of 6 open"),
        ("010100", "blocks 2, 4 of 6 open"),
    ],
)
def test_open_blocks_are_told_as_ranges(gates, shown):
    assert open_blocks(torch.tensor([gate == "1" for gate in gates])) == shown


def test_a_block_that_is_open_for_any_sample_is_open():
    gates = torch.tensor([[True, False], [False, False], [True, True]])
    assert open_blocks(gates) == "blocks 1, 3 of 3 open"


def test_the_gates_of_a_loss_that_is_not_finite_are_told(small, path, silent, monkeypatch):
    run, images = begin(small, path)
    normal = images.train

    def poisoned(epoch, start=0):
        for step, (pixels, labels) in enumerate(normal(epoch, start), start):
            yield pixels * (float("inf") if step == 6 else 1), labels

    monkeypatch.setattr(images, "train", poisoned)
    survival = tuple(sd.LinearDecay(0.3)(block, 6) for block in range(1, 7))
    gates = re.escape(open_blocks(draw(small.seed, 6, survival)))
    with pytest.raises(DivergedError, match=rf"{gates}, the loss is not finite at step 6 .*000004"):
        list(fit(run, images, silent))


OUT_OF_MEMORY = """
import dataclasses, resource, sys
from pathlib import Path
from stochastic_depth.errors import OutOfMemoryError
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig, OptimizerConfig, begin, fit
from stochastic_depth.train.display import RunView

def limit(bytes_more):
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + bytes_more,) * 2)

config = dataclasses.replace(
    RECIPES["digits"](), model=ModelConfig(depth=56), engine="eager",
    optimizer=OptimizerConfig(batch=1000), epochs=1,
)
run, images = begin(config, Path(sys.argv[1]))
limit(2**28)
try:
    list(fit(run, images, RunView("", print)))
except OutOfMemoryError as error:
    print(error)
    sys.exit(3)
"""


KILLED_LOADER = """
import multiprocessing, os, signal, sys
from pathlib import Path
from stochastic_depth.errors import OutOfMemoryError
from stochastic_depth.train import fit, reopen
from stochastic_depth.train.display import RunView

class Killing(RunView):
    def step(self, training, loss):
        if training.step == 1:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

try:
    list(fit(*reopen(Path(sys.argv[1])), Killing("", print)))
except OutOfMemoryError as error:
    print(error)
    sys.exit(3)
"""


def child(program: str, path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, path],
        capture_output=True,
        text=True,
        env=environment(),
    )


def test_a_step_that_needs_more_memory_than_there_is_names_itself_and_the_remedies(path):
    done = child(OUT_OF_MEMORY, path)
    assert done.returncode == 3, done.stderr
    assert re.match(
        r"out of memory at step 0 of \S+run \(blocks 1\S* .*of 27 open\): ", done.stdout
    )
    assert "there is no good checkpoint before it" in done.stdout
    assert "--optimizer.batch (it is 1000)" in done.stdout


@pytest.fixture
def pictures_config(small, tmp_path):
    """A small network on a tree of pictures that worker processes decode."""
    write_imagenet(tmp_path / "pictures")
    data = DataConfig(name="imagenet", root=tmp_path / "pictures", workers=1)
    model, optimizer = ModelConfig(depth=8), replace(small.optimizer, batch=2)
    return replace(
        small, data=data, model=model, optimizer=optimizer, epochs=1, evaluate_every=None
    )


def test_a_loader_that_the_system_has_killed_is_told(pictures_config, path):
    begin(pictures_config, path)
    done = child(KILLED_LOADER, path)
    assert done.returncode == 3, done.stderr
    # Its death is seen by the signal, or by the connection that breaks, whichever is first.
    assert re.match(r"a process that decodes pictures has died .*--data\.workers", done.stdout)


DEATHS = {
    "by the signal": RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    "by its exit": RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
    "by the connection": ConnectionResetError("Connection reset by peer"),
    "by the end of the connection": EOFError(),
}


@pytest.mark.parametrize("seen", DEATHS)
def test_a_run_is_kept_however_the_death_of_a_loader_is_seen(
    pictures_config, path, silent, seen, monkeypatch
):
    def dies(_):
        raise DEATHS[seen]
        yield

    run, images = begin(pictures_config, path)
    monkeypatch.setattr(folder_batches, "_on_cpu", dies)
    with pytest.raises(OutOfMemoryError, match="a process that decodes pictures has died"):
        list(images.evaluate("test"))
    with pytest.raises(OutOfMemoryError, match="a process that decodes pictures has died"):
        list(fit(run, images, silent))
    monkeypatch.undo()
    assert list(fit(*reopen(path), silent))


def test_a_death_that_is_seen_during_a_step_is_told(pictures_config, path, silent, monkeypatch):
    def dies(*_):
        raise DEATHS["by the signal"]

    monkeypatch.setattr(TrainState, "advance", dies)
    with pytest.raises(OutOfMemoryError, match="a process that decodes pictures has died"):
        list(fit(*begin(pictures_config, path), silent))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_number_of_workers_does_not_change_the_weights(pictures_config, path, silent, tmp_path):
    def trained(workers):
        data = replace(pictures_config.data, workers=workers)
        config = replace(pictures_config, data=data)
        return finish(tmp_path / f"{workers}", config, silent)[0]

    alone = trained(0)
    for workers in (1, 3):
        assert_same_end(alone, trained(workers))


def under_way(config, path, watch, records):
    """A run after some records, still being written."""
    run, images = begin(config, path)
    records_of_run = fit(run, images, watch)
    for _ in range(records):
        next(records_of_run)
    return run, records_of_run


@pytest.mark.parametrize("records", [1, 5])
def test_a_folder_that_is_removed_while_it_is_written_is_told(small, path, silent, records):
    _, rest = under_way(small, path, silent, records)
    shutil.rmtree(path)
    with pytest.raises(RunError, match="removed or replaced"):
        list(rest)
    assert not path.exists()


def test_a_run_does_not_write_into_the_folder_of_another_that_took_its_place(small, path, silent):
    _, rest = under_way(small, path, silent, 2)
    shutil.rmtree(path)
    finish(path, replace(small, seed=1), silent)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match="removed or replaced"):
        list(rest)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_two_do_not_write_one_folder_even_if_its_lock_is_removed(small, path, silent):
    _, first = under_way(small, path, silent, 2)
    (path / "lock").unlink()
    list(fit(*reopen(path), silent))
    with pytest.raises(RunError, match="removed or replaced"):
        list(first)


@pytest.mark.parametrize(
    "harm",
    [
        lambda journal: journal.unlink(),
        lambda journal: journal.write_bytes(journal.read_bytes()[:-1]),
        lambda journal: journal.write_bytes(b""),
    ],
)
def test_a_journal_that_loses_lines_while_it_is_written_is_told(small, path, silent, harm):
    run, rest = under_way(small, path, silent, 2)
    harm(run.journal)
    with pytest.raises(RunError, match="lines are missing"):
        list(rest)
    with pytest.raises(RunError, match="lines are missing"):
        list(fit(*reopen(path), silent))


def test_a_clock_that_runs_backwards_changes_nothing(small, path, silent, monkeypatch, tmp_path):
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    run, rest = under_way(small, path, silent, 3)
    rest.close()
    for age, step in enumerate(run.checkpoints.steps()):  # the newest seems to be the oldest
        os.utime(run.checkpoints.path(step), (10**9 - age, 10**9 + age))
    list(fit(*reopen(path), silent))
    assert all(record.seconds > 0 and record.images_per_second > 0 for record in run.records())
    monkeypatch.undo()
    assert_same_end(run, finish(tmp_path / "other", small, silent)[0])


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_and_folders_have_the_permissions_that_the_user_gives_to_all(
    small, path, silent, mask
):
    before = os.umask(mask)
    try:
        run, _ = finish(path, small, silent)
    finally:
        os.umask(before)
    assert len(list(path.rglob("*"))) >= 6
    for found in (path, *path.rglob("*")):
        mode = stat.S_IMODE(found.stat().st_mode)
        full = 0o777 if found.is_dir() else 0o666
        # The lock is the library filelock's, which allows others to read at most.
        assert mode == full & ~mask or (found.name == "lock" and not mode & 0o022), found
    assert dataclasses.replace(run.config) == small


def test_training_asks_nothing_of_the_network(small, path, silent, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = replace(small, survival=SurvivalConfig(final=0.5), epochs=1)
    finish(path, config, silent)
