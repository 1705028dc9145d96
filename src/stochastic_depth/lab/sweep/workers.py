"""Workers: processes that train one run after the other until the sweep has none left."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from filelock import FileLock, Timeout

from stochastic_depth.data import Batches
from stochastic_depth.errors import ConfigError, DivergedError, RunError, StochasticDepthError
from stochastic_depth.extras import require
from stochastic_depth.files import is_there, require_writable
from stochastic_depth.lab.sweep.folder import Point, Sweep
from stochastic_depth.train import Interrupted, Record, Run, begin, best_record, fit, reopen
from stochastic_depth.train.fit import StopSignals
from stochastic_depth.train.training import Training

SERVER = "postgresql://"


def open_storage(journal: Path, lock: FileLock, url: str | None) -> Any:
    """Optuna's storage.

    Args:
        journal: the file, where no `url` is given.
        lock: held by whoever writes the journal.
        url: postgresql://user:password@host/database.

    Raises:
        ConfigError: when `url` is not of a PostgreSQL server.
        MissingExtraError: Optuna or psycopg is not installed.
        RunError: when the server cannot be reached.
    """
    optuna = require("optuna", "sweep")
    if url is None:
        # Optuna's own lock outlives a killed process by its grace period of 30 s.
        backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=lock)
        return optuna.storages.JournalStorage(backend)
    if not url.startswith(SERVER):
        raise ConfigError(f"the queue's storage is {url!r}: it must begin with {SERVER}")
    require("psycopg", "sweep")
    # A connection for each look: between two of them, a server may be started anew.
    unpooled = {"poolclass": require("sqlalchemy", "sweep").NullPool}
    with storage_told(journal):
        return optuna.storages.RDBStorage(
            url.replace(SERVER, "postgresql+psycopg://", 1), engine_kwargs=unpooled
        )


@contextmanager
def storage_told(journal: Path) -> Iterator[None]:
    """Errors of the storage as one sentence, without the password in the URL."""
    optuna, sqlalchemy = require("optuna", "sweep"), require("sqlalchemy", "sweep")
    try:
        yield
    except StochasticDepthError:
        raise
    except (ValueError, KeyError) as error:  # from a journal that is none
        raise RunError(
            f"{journal} is damaged ({error}): delete it, it is made anew from the run folders"
        ) from error
    except (
        optuna.exceptions.StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        OSError,
    ) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise RunError(f"the queue of the sweep cannot be used: {reason}") from error


def drop_unfinished_line(journal: Path) -> None:
    """Cut off what a process that was killed while it wrote has left; others may not be writing."""
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)


@dataclass(frozen=True)
class Claim:
    """The right to train a point, until `lock` is released or this process dies."""

    point: Point
    number: int
    """Of its trial."""
    lock: FileLock


class Queue:
    """The trials of a sweep.

    Args:
        url: of a PostgreSQL server; None: a file in the sweep's folder.

    Raises:
        ConfigError, MissingExtraError, RunError: as `open_storage`.
    """

    def __init__(self, sweep: Sweep, url: str | None = None) -> None:
        self._optuna = require("optuna", "sweep")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._sweep = sweep
        self._points = {point.name: point for point in sweep.grid.points()}
        self._lock = FileLock(sweep.folder / "lock")
        self._journal = sweep.folder / "queue.jsonl"
        with self._alone():
            self._study = self._optuna.create_study(
                storage=open_storage(self._journal, self._lock, url),
                study_name=sweep.study,
                load_if_exists=True,
            )

    def take(self) -> Claim | None:
        """A point that nobody trains; None while every one has ended or is being trained.

        Raises:
            RunError: when the storage cannot be used.
        """
        with self._alone():
            self._fill()
            states = self._optuna.trial.TrialState
            for trial in self._trials(states.RUNNING):
                claim = self._claim(trial)
                if claim is not None:
                    return claim
            if self._trials(states.WAITING):
                return self._claim(self._study.ask())
            return None

    def end(self, claim: Claim) -> None:
        """Record what the run of `claim` came to: its best validation error, or that it failed.

        Raises:
            RunError: when the storage cannot be used.
        """
        told: dict[str, Any] = {"state": self._optuna.trial.TrialState.FAIL}
        if self._sweep.done(claim.point):
            told = {"values": best_record(self._sweep.records(claim.point)).validation_error}
        with self._alone():
            self._study.tell(claim.number, **told)

    def running(self) -> list[Point]:
        """The points under way, or left by a worker that is gone.

        Raises:
            RunError: when the storage cannot be used.
        """
        with storage_told(self._journal):
            trials = self._trials(self._optuna.trial.TrialState.RUNNING)
        points = [self._points[trial.user_attrs["run"]] for trial in trials]
        return [point for point in points if not self._sweep.ended(point)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._lock, storage_told(self._journal):
            require_writable(self._journal)
            drop_unfinished_line(self._journal)
            yield

    def _trials(self, *states: Any) -> list[Any]:
        return self._study.get_trials(deepcopy=False, states=states)

    def _fill(self) -> None:
        """A trial for each point that has none, or whose run folder was taken away."""
        known = {
            trial.user_attrs["run"]
            for trial in self._study.get_trials(deepcopy=False)
            if not trial.state.is_finished()
            or self._sweep.ended(self._points[trial.user_attrs["run"]])
        }
        for point in self._points.values():
            if point.name not in known:
                self._study.add_trial(self._waiting(point))

    def _waiting(self, point: Point) -> Any:
        grid = self._sweep.grid
        choices: dict[str, tuple] = {"depth": grid.depths, "seed": grid.seeds}
        if grid.gatings:
            choices["gating"] = grid.gatings
        else:
            choices["rule"] = grid.rules
        if point.survival is not None:
            choices["survival"] = grid.survival
        return self._optuna.trial.create_trial(
            state=self._optuna.trial.TrialState.WAITING,
            params={name: getattr(point, name) for name in choices},
            distributions={
                name: self._optuna.distributions.CategoricalDistribution(values)
                for name, values in choices.items()
            },
            user_attrs={"run": point.name},
        )

    def _claim(self, trial: Any) -> Claim | None:
        point = self._points[trial.user_attrs["run"]]
        path = self._sweep.folder / "claims" / point.name
        require_writable(path, inside=2)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return Claim(point, trial.number, lock)


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
    if path.is_symlink():
        raise RunError(f"{path} is a link, expected a run folder: remove it")
    if is_there(path) and not is_there(path / "config.json"):
        shutil.rmtree(path)  # its process was killed while it made the folder
    if not is_there(path):
        return begin(config, path)
    run, images = reopen(path, config.data.root)
    if run.config.essential() != config.essential():
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
