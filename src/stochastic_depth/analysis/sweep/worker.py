"""Workers: processes that train one run after the other until the sweep has none left."""

import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Self

import torch

from stochastic_depth.analysis.comparison import what_matters
from stochastic_depth.analysis.sweep.folder import Sweep
from stochastic_depth.analysis.sweep.grid import Point
from stochastic_depth.analysis.sweep.queue import Queue
from stochastic_depth.data import Batches
from stochastic_depth.errors import DivergedError, RunError, StochasticDepthError
from stochastic_depth.train import Interrupted, Record, Run, begin, fit, reopen
from stochastic_depth.train.signals import StopSignals
from stochastic_depth.train.training import Training

SECONDS_BETWEEN_LOOKS = 0.5


class Workers:
    """Processes that train the runs of a sweep; left, they stop, each with a checkpoint.

    Args:
        url: of the queue, as `Queue` takes it.
        count: how many.
        threads: of each.
    """

    def __init__(self, sweep: Sweep, url: str | None, count: int, threads: int) -> None:
        spawn = get_context("spawn")
        arguments = (sweep, url, threads)
        self._processes = [spawn.Process(target=_work, args=arguments) for _ in range(count)]

    def __enter__(self) -> Self:
        # Ctrl-C reaches the whole group of processes; this one tells the workers to stop.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for process in self._processes:
            process.start()
        signal.signal(signal.SIGINT, before)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def working(self) -> bool:
        """Wait a moment; whether a worker is still there then."""
        there = [process.sentinel for process in self._processes if process.is_alive()]
        connection.wait(there, timeout=SECONDS_BETWEEN_LOOKS)
        return any(process.is_alive() for process in self._processes)


def work(sweep: Sweep, queue: Queue, stop: Callable[[], int | None]) -> None:
    """Train what the queue gives until every point has ended.

    While others train the last points it waits, to take over from one that dies.

    Args:
        stop: asked after every step; a signal number makes the run write a checkpoint.

    Raises:
        Interrupted: when `stop` said so in the middle of a run.
        StochasticDepthError: when a run cannot be trained here and now (its data is missing, the
            disk is full): the point stays open.
    """
    threads = torch.get_num_threads()
    while not stop():
        claim = queue.take()
        if claim is not None:
            torch.set_num_threads(threads)
            try:
                train_point(sweep, claim.point, stop)
                queue.end(claim)
            finally:
                claim.lock.release()
        elif all(map(sweep.ended, sweep.grid.points())):
            return
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def train_point(sweep: Sweep, point: Point, stop: Callable[[], int | None]) -> None:
    """Train the run of a point to its end, from where it is; a run that diverges has failed.

    Raises:
        Interrupted, StochasticDepthError: as `work`.
    """
    if sweep.ended(point):
        return
    try:
        run, images = _open(sweep, point)
        for _ in fit(run, images, _Silent(point.name), stop):
            pass
    except DivergedError as error:
        sweep.fail(point, str(error))


def _open(sweep: Sweep, point: Point) -> tuple[Run, Batches]:
    path, config = sweep.path(point), point.of(sweep.config)
    if path.exists() and not (path / "config.json").exists():
        shutil.rmtree(path)  # its process was killed while it made the folder
    if not path.exists():
        return begin(config, path)
    run, images = reopen(path, config.data.root)
    if what_matters(run.config) != what_matters(config):
        raise RunError(f"{path} has another configuration than its sweep: take it away")
    torch.set_num_threads(run.execution.threads)  # the same sums as those it began with
    return run, images


def _work(sweep: Sweep, url: str | None, threads: int) -> None:
    """The body of a worker's process: as `work`, until its parent is gone."""
    torch.set_num_threads(threads)
    parent = parent_process()
    with StopSignals((signal.SIGTERM,)) as signals:

        def stop() -> int | None:
            orphaned = parent is not None and not parent.is_alive()
            return signal.SIGTERM if orphaned else signals()

        try:
            work(sweep, Queue(sweep, url), stop)
        except Interrupted:
            sys.exit(128 + signal.SIGTERM)
        except StochasticDepthError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


class _Silent:
    """A `Watch` that tells what is unusual alone."""

    def __init__(self, label: str) -> None:
        self._label = label

    def begin(self, run: Run, training: Training) -> None: ...
    def step(self, training: Training, loss: torch.Tensor) -> None: ...
    def evaluating(self) -> None: ...
    def record(self, record: Record) -> None: ...

    def say(self, text: str) -> None:
        print(f"{self._label} {text}", file=sys.stderr)
