"""A sweep whose workers are killed ends, bit for bit, where it would have ended."""

import multiprocessing
import os
import random
import signal
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from stochastic_depth.errors import DataError, Interrupted, RunError
from stochastic_depth.lab.sweep.folder import open_sweep
from stochastic_depth.lab.sweep.workers import Workers, claim_next, train_point, work
from stochastic_depth.train import DataConfig, OptimizerConfig, open_run
from stochastic_depth.train.signals import StopSignals
from support.runs import assert_same_end
from support.small_sweep import GRID, SMALL

LONGER = replace(SMALL, epochs=8, evaluate_every=4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same runs, trained one after the other by nobody else."""
    sweep = open_sweep(tmp_path_factory.mktemp("sweep") / "undisturbed", "survival", GRID, LONGER)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for point in GRID.points():
        train_point(sweep, point, lambda: None)
    torch.set_num_threads(threads)
    return sweep


def finished(sweep):
    return {p: sweep.path(p) / "model.safetensors" for p in GRID.points() if sweep.done(p)}


def begun(sweep):
    """The identities of runs that have a checkpoint."""
    points = [p for p in GRID.points() if sweep.records(p)]
    return {p: open_run(sweep.path(p)).id for p in points}


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_workers_lose_nothing_and_nothing_is_trained_twice(
    tmp_path, undisturbed, soak, counts
):
    sweep = open_sweep(tmp_path / "killed", "survival", GRID, LONGER)
    wanted, kills = 20 if soak else 1, 0
    moments, alive = random.Random(0), multiprocessing.active_children
    with ExitStack() as workers:
        workers.enter_context(Workers(sweep, count=2, threads=1))
        while kills < wanted:
            while len(begun(sweep)) <= kills % 6 and len(finished(sweep)) < 6:
                assert alive()
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 0.3))
            written = {path: path.stat().st_mtime_ns for path in finished(sweep).values()}
            before = begun(sweep)
            if not (victims := alive()):
                break
            victim = moments.choice(victims)
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            kills += victim.exitcode == -signal.SIGKILL
            if kills < wanted:
                workers.enter_context(Workers(sweep, count=1, threads=1))
        while alive():
            time.sleep(0.1)
    assert kills > wanted / 2
    assert len(finished(sweep)) == 6
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert before.items() <= begun(sweep).items()
    for point in GRID.points():
        assert_same_end(open_run(undisturbed.path(point)), open_run(sweep.path(point)))
    assert claim_next(sweep) is None
    counts["kills of workers, whose sweep ended bit for bit as undisturbed"] += kills


def test_a_run_of_its_folder_alone_goes_on_with_the_threads_it_began_with(tmp_path, undisturbed):
    sweep = open_sweep(tmp_path / "sweep", "survival", GRID, LONGER)
    point, threads = GRID.points()[1], torch.get_num_threads()
    looks = iter(range(10**6))
    torch.set_num_threads(1)
    with pytest.raises(Interrupted):
        train_point(sweep, point, lambda: signal.SIGTERM if next(looks) > 30 else None)
    torch.set_num_threads(2)
    train_point(sweep, point, lambda: None)
    torch.set_num_threads(threads)
    assert_same_end(open_run(undisturbed.path(point)), open_run(sweep.path(point)))


def test_a_run_that_has_lost_its_description_keeps_its_work(sweep):
    point = GRID.points()[0]
    train_point(sweep, point, lambda: None)
    for name in ("model.safetensors", "config.json"):
        (sweep.path(point) / name).unlink()
    before = {path: path.read_bytes() for path in sweep.path(point).rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"has lost its config\.json: put a copy in its place"):
        train_point(sweep, point, lambda: None)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_folder_whose_process_was_killed_while_it_was_removed_is_made_anew(sweep):
    point = GRID.points()[0]
    (sweep.path(point) / "checkpoints").mkdir(parents=True)
    train_point(sweep, point, lambda: None)
    assert sweep.done(point)


def test_a_run_that_diverges_fails_with_its_sentence_once_and_the_others_go_on(tmp_path):
    grid = replace(GRID, seeds=(0,))
    config = replace(SMALL, optimizer=OptimizerConfig(learning_rate=1e30))
    sweep = open_sweep(tmp_path / "sweep", "survival", grid, config)
    work(sweep, lambda: None)
    for point in grid.points():
        assert "not finite at step" in sweep.failure(point)
        assert not sweep.done(point)
        described = sweep.path(point) / "config.json"
        os.utime(described, (0, 0))
    work(sweep, lambda: None)
    assert all((sweep.path(p) / "config.json").stat().st_mtime == 0 for p in grid.points())


def test_missing_data_stops_the_worker_and_fails_no_run(sweep, tmp_path):
    moved = DataConfig(name="cifar10", root=tmp_path / "nowhere")
    sweep = replace(sweep, config=replace(SMALL, data=moved))
    with pytest.raises(DataError, match="nowhere"):
        work(sweep, lambda: None)
    assert not any(map(sweep.ended, GRID.points()))
    assert claim_next(sweep).point == GRID.points()[0]


def test_a_foreign_run_in_the_way_is_named(sweep, tmp_path):
    other = open_sweep(tmp_path / "other", "survival", GRID, replace(SMALL, epochs=1))
    point = GRID.points()[0]
    train_point(other, point, lambda: None)
    (other.path(point) / "model.safetensors").unlink()
    other.path(point).rename(sweep.path(point))
    with pytest.raises(
        RunError, match=r"not the run of this point .* its config\.epochs is 1, not 2; move"
    ):
        train_point(sweep, point, lambda: None)


def test_workers_that_cannot_start_leave_ctrl_c_as_it_was_and_no_process(sweep, monkeypatch):
    def failing():
        raise OSError("no more processes")

    workers = Workers(sweep, count=2, threads=1)
    monkeypatch.setattr(workers._processes[1], "start", failing)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(OSError, match="no more"), workers:
        pass
    assert signal.getsignal(signal.SIGINT) is before
    assert not multiprocessing.active_children()


@pytest.fixture
def interrupted(sweep, monkeypatch):
    """Workers that Ctrl-C reaches when the first of two has been started."""
    workers = Workers(sweep, count=2, threads=1)
    monkeypatch.setattr(workers._processes[1], "start", lambda: os.kill(os.getpid(), signal.SIGINT))
    return workers


def test_ctrl_c_is_remembered_while_workers_start(interrupted):
    with StopSignals() as stop, interrupted:
        assert stop() == signal.SIGINT
    assert not multiprocessing.active_children()


def test_ctrl_c_that_nobody_remembers_stops_the_workers_that_were_started(interrupted):
    with pytest.raises(KeyboardInterrupt), interrupted:
        pass
    assert not multiprocessing.active_children()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_worker_that_was_killed_is_told_by_its_signal(tmp_path):
    sweep = open_sweep(tmp_path / "sweep", "survival", GRID, replace(SMALL, epochs=1000))
    with Workers(sweep, count=1, threads=1) as workers:
        (victim,) = multiprocessing.active_children()
        os.kill(victim.pid, signal.SIGKILL)
        while workers.working():
            pass
        assert workers.killed() == [signal.SIGKILL]


def test_a_worker_that_is_told_to_stop_leaves_a_checkpoint(tmp_path):
    sweep = open_sweep(tmp_path / "sweep", "survival", GRID, replace(SMALL, epochs=1000))
    with Workers(sweep, count=1, threads=1) as workers:
        while not begun(sweep):
            assert workers.working()
    (point,) = begun(sweep)
    run = open_run(sweep.path(point))
    assert run.checkpoints.steps()[0] >= run.records()[-1].step
    assert not multiprocessing.active_children()
