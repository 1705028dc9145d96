"""Workers: processes that train one run after the other until the sweep has none left.

A worker holds a lock on the point that it trains, which is its claim. Whether a point has ended is
read from the run folders alone. The operating system releases the locks of a process that dies,
however it dies. So the next worker that looks for a point takes this one over, from its last
checkpoint. Workers share only the folder, on one machine or on many; there is no queue that would
have to agree with it.
"""

import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from filelock import FileLock, Timeout

from stochastic_depth.data import Batches
from stochastic_depth.errors import DivergedError, Interrupted, RunError, StochasticDepthError
from stochastic_depth.files import is_there, reason, require_writable
from stochastic_depth.lab.sweep.folder import Sweep
from stochastic_depth.lab.sweep.grid import Point
from stochastic_depth.plain_text import escaped
from stochastic_depth.processes import fresh_processes, interrupts_blocked
from stochastic_depth.train import Run, begin, fit, reopen
from stochastic_depth.train.display import Silent
from stochastic_depth.train.signals import StopSignals

SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Claim:
    """The right to train a point, until it is released or this process dies."""

    point: Point
    lock: FileLock

    def release(self) -> None:
        self.lock.release()


def claim_next(sweep: Sweep) -> Claim | None:
    """Claim the first point that has not ended and that no worker trains; None if none is left.

    Raises:
        RunError: when the folder of the claims cannot be written.
    """
    for point in sweep.grid.points():
        if sweep.ended(point):
            continue
        lock = _lock(sweep, point)
        if lock is None:
            continue
        if not sweep.ended(point):
            return Claim(point, lock)
        lock.release()  # another worker has ended it in the meantime
    return None


def read_claims(sweep: Sweep) -> list[Point]:
    """The points that workers train now.

    Each claim is locked for an instant to see whether a worker holds it. A worker that looks for a
    point just then takes the next one, or looks again.

    Raises:
        RunError: as `claim_next`.
    """
    return [point for point in sweep.grid.points() if _is_claimed(sweep, point)]


def _is_claimed(sweep: Sweep, point: Point) -> bool:
    # The file stays when the lock is released, and a sweep that has ended may be read-only.
    if sweep.ended(point) or not is_there(_claim_file(sweep, point)):
        return False
    lock = _lock(sweep, point)
    if lock is None:
        return True
    lock.release()
    return False


def _lock(sweep: Sweep, point: Point) -> FileLock | None:
    """The lock on the claim of a point; None if it is held already."""
    path = _claim_file(sweep, point)
    lock = FileLock(path, timeout=0)
    try:
        require_writable(path, inside=sweep.folder)
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be written: {reason(error)}") from error
    return lock


def _claim_file(sweep: Sweep, point: Point) -> Path:
    return sweep.folder / "claims" / point.name


class Workers:
    """Processes that train the runs of a sweep. On leaving, they stop, each with a checkpoint.

    Args:
        count: how many processes.
        threads: how many threads each process has.
    """

    def __init__(self, sweep: Sweep, count: int, threads: int) -> None:
        fresh, arguments = fresh_processes(__name__), (sweep, threads)
        self._processes = [fresh.Process(target=_work, args=arguments) for _ in range(count)]

    def __enter__(self) -> Self:
        try:
            with interrupts_blocked():  # on Ctrl-C this process tells the workers to stop
                for process in self._processes:
                    process.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.terminate()
        for process in started:
            process.join()

    def working(self) -> bool:
        """Wait a moment, then return whether any worker is still alive."""
        there = [process.sentinel for process in self._processes if process.is_alive()]
        connection.wait(there, timeout=SECONDS_BETWEEN_LOOKS)
        return any(process.is_alive() for process in self._processes)

    def killed(self) -> list[int]:
        """The signals by which workers were killed, one for each."""
        codes = [process.exitcode or 0 for process in self._processes]
        return [-code for code in codes if code < 0]


def work(sweep: Sweep, stop: Callable[[], int | None]) -> None:
    """Train points that no other worker trains, until every point has ended.

    While others train the last points it waits, to take over from a worker that dies.

    Args:
        stop: called after every step; if it returns a signal number, the run writes a checkpoint.

    Raises:
        Interrupted: when `stop` asked for it in the middle of a run.
        StochasticDepthError: when a run cannot be trained here and now, because its data is missing
            or the disk is full for example. The point then stays open.
    """
    threads = torch.get_num_threads()
    while not stop():
        claim = claim_next(sweep)
        if claim is not None:
            torch.set_num_threads(threads)
            try:
                train_point(sweep, claim.point, stop)
            finally:
                claim.release()
        elif all(map(sweep.ended, sweep.grid.points())):
            return
        else:
            time.sleep(SECONDS_BETWEEN_LOOKS)


def train_point(sweep: Sweep, point: Point, stop: Callable[[], int | None]) -> None:
    """Train the run of a point from its last checkpoint to its end; if it diverges, it failed.

    Raises:
        Interrupted, StochasticDepthError: as `work`.
    """
    if sweep.ended(point):
        return
    try:
        run, batches = _open(sweep, point)
        for _ in fit(run, batches, _UnusualEvents(point.name), stop):
            pass
    except DivergedError as error:
        sweep.fail(point, str(error))


def _open(sweep: Sweep, point: Point) -> tuple[Run, Batches]:
    path, config = sweep.path(point), sweep.configs[point]
    if path.is_symlink():
        raise RunError(f"{path} is a link, expected a run folder: remove it")
    if not sweep.begun(point):
        if is_there(path):
            shutil.rmtree(path)
        return begin(config, path, sweep.fingerprint)
    run, batches = reopen(path, config.data.root)
    sweep.require_own([run])
    torch.set_num_threads(run.runtime.threads)  # so that sums are rounded as before
    return run, batches


def _work(sweep: Sweep, threads: int) -> None:
    """The body of a worker's process: `work`, until the parent process is gone."""
    torch.set_num_threads(threads)
    parent = parent_process()
    with StopSignals((signal.SIGTERM,)) as signals:

        def stop() -> int | None:
            orphaned = parent is not None and not parent.is_alive()
            return signal.SIGTERM if orphaned else signals()

        try:
            work(sweep, stop)
        except Interrupted:
            sys.exit(128 + signal.SIGTERM)
        except StochasticDepthError as error:
            print(f"error: {escaped(str(error))}", file=sys.stderr)
            sys.exit(1)


class _UnusualEvents(Silent):
    """A callback that prints what a run says, and nothing of its progress."""

    def __init__(self, label: str) -> None:
        self._label = label

    def say(self, text: str) -> None:
        print(escaped(f"{self._label} {text}"), file=sys.stderr)
