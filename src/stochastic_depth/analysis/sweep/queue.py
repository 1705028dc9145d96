"""Which run is next: one Optuna trial for each point of the grid, shared by all workers.

A worker takes a trial under the sweep's lock and holds a lock of its own on it, its claim, until
the trial has ended. The system drops the locks of a process that dies, however it dies, so a trial
that is running without a claim has lost its worker, and goes to the next one that asks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from filelock import FileLock, Timeout

from stochastic_depth.analysis.sweep.folder import Sweep
from stochastic_depth.analysis.sweep.grid import Point
from stochastic_depth.analysis.sweep.storage import (
    drop_unfinished_line,
    open_storage,
    storage_told,
)
from stochastic_depth.extras import require
from stochastic_depth.train import best_record


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
        choices = {"rule": grid.rules, "depth": grid.depths, "seed": grid.seeds}
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
        claims = self._sweep.folder / "claims"
        claims.mkdir(exist_ok=True)
        lock = FileLock(claims / point.name, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return None
        return Claim(point, trial.number, lock)
