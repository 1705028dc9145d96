"""The training loop: an iterator over the records of a run, resumable at any step."""

import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from stochastic_depth.data import Batches
from stochastic_depth.distributed.world import any_rank, on_primary, ranks
from stochastic_depth.errors import CheckpointError, RunError, StochasticDepthError
from stochastic_depth.files import is_there
from stochastic_depth.train.checkpoint import read_weights, write_weights
from stochastic_depth.train.failures import diverged, memory_watched, open_blocks
from stochastic_depth.train.journal import Record, append_record, best_record, truncate_journal
from stochastic_depth.train.run import Run
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import IntervalMetrics, evaluate_parts
from stochastic_depth.train.training import Training

_STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 50}
"""Reading a loss synchronises with the GPU, so it is done rarely."""


class Interrupted(StochasticDepthError):
    """A run that was asked to stop by a signal, and has written a checkpoint."""

    def __init__(self, run: Path, step: int, signal: int) -> None:
        super().__init__(f"{run} stopped at step {step}, with a checkpoint")
        self.run, self.signal = run, signal


class Callback(Protocol):
    """Methods that `fit` calls while a run trains."""

    def begin(self, run: Run, training: Training) -> None: ...
    def step(self, training: Training, loss: Tensor) -> None: ...
    def evaluating(self) -> None: ...
    def record(self, record: Record) -> None: ...
    def say(self, text: str) -> None: ...


def fit(
    run: Run,
    batches: Batches,
    callback: Callback,
    stop: Callable[[], int | None] = lambda: None,
) -> Iterator[Record]:
    """Train `run` from its newest checkpoint to its end, giving each record as it is written.

    Killed at any instant, it loses at most the work since the last checkpoint; called again, it
    ends, on a CPU, bit for bit where it would have ended.

    Args:
        run: the folder to write.
        batches: the data the run was created on.
        callback: called after every step and with every record.
        stop: called after every step; when it returns the number of a signal, the run writes a
            checkpoint and stops.

    Raises:
        RunError: when another process writes the folder, it is removed, or nothing can be written;
            or the data is not that of the run.
        CheckpointError: when no checkpoint can be trusted, or one cannot be written.
        DivergedError: when a loss or a weight is not finite.
        OutOfMemoryError: when a step or an evaluation needs more memory than there is.
        Interrupted: when `stop` said so.
    """
    run.require_data(batches.fingerprint)
    with ExitStack() as stack:
        still_ours = stack.enter_context(_writing(run))
        training = Training(run.config, run.runtime, batches)
        stack.enter_context(memory_watched(run, training))
        _restore(run, training, callback)
        callback.begin(run, training)
        stream = _stream(batches, training.step)
        journal = on_primary(run.journal_length)
        while training.step < training.steps or training.tally.images:
            record = None
            if _finish_interval(run, training, stream, callback, stop):
                record = _measure(training, batches, callback, stop)
            still_ours()
            # No other process has written to the journal in the meantime.
            on_primary(partial(truncate_journal, run.journal, journal))
            if record is None:
                _save(run, training)
                raise Interrupted(run.path, training.step, stop() or 0)
            if not record.is_finite:
                raise diverged(run, training.step, "an evaluation")
            on_primary(partial(append_record, run.journal, record))
            journal = on_primary(run.journal_length)
            training.tally = IntervalMetrics()
            _save(run, training)
            callback.record(record)
            yield record
        still_ours()
        on_primary(lambda: _write_weights(run, training, callback))


@contextmanager
def _writing(run: Run) -> Iterator[Callable[[], None]]:
    """Enter `run.writing()` in the first of several processes; the check it gives works in all."""
    checks: list[Callable[[], None]] = []
    with ExitStack() as stack:
        on_primary(lambda: checks.append(stack.enter_context(run.writing())))
        yield lambda: on_primary(lambda: checks[0]())


def _restore(run: Run, training: Training, callback: Callback) -> None:
    # Where several processes train, the folder need not be in reach of any but the first.
    device = run.runtime.device if ranks() == 1 else "cpu"
    state, refused = on_primary(lambda: run.checkpoints.newest(device))
    for reason in refused:
        callback.say(f"{reason}; using the one before it")
    if state is not None:
        threads = torch.get_num_threads()
        if run.runtime.device == "cpu" and threads != run.runtime.threads:
            callback.say(
                f"begun with {run.runtime.threads} threads, going on with {threads}: sums are "
                "rounded differently (set OMP_NUM_THREADS for the same end bit by bit)"
            )
        training.load_state_dict(state)
    elif on_primary(lambda: bool(is_there(run.weights) and run.records())):
        raise CheckpointError(
            f"{run.path} has ended, and its checkpoints are gone: there is nothing to go on from, "
            "and its journal and weights are kept as they are"
        )
    length = 0 if state is None else state["journal_bytes"]
    on_primary(lambda: truncate_journal(run.journal, length))


def _stream(batches: Batches, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch, start = divmod(step, batches.steps_per_epoch)
    while True:
        yield from batches.train(epoch, start)
        epoch, start = epoch + 1, 0


def _finish_interval(
    run: Run,
    training: Training,
    stream: Iterator[tuple[Tensor, Tensor]],
    callback: Callback,
    stop: Callable[[], int | None],
) -> bool:
    """Train up to the next evaluation; returns False if a stop signal comes before."""
    interval = run.config.evaluate_every or training.steps_per_epoch
    intervals_begun = -(-training.step // interval) + (not training.tally.images)
    end = min(training.steps, intervals_begun * interval)
    look = _STEPS_BETWEEN_CHECKS.get(torch.device(training.runtime.device).type, 1)
    began = time.perf_counter()
    stopping = any_rank(bool(stop()))
    while training.step < end and not stopping:
        measured = training.advance(*next(stream))
        callback.step(training, measured.loss)
        if training.step % look == 0 or training.step == end or (stop() and ranks() == 1):
            position = training.tally.first_diverged(look)
            if position is not None:
                step = training.step - len(training.tally.measured) + position
                gates = open_blocks(training.gates_at(step))
                raise diverged(run, step, f"with {gates}, the loss")
            stopping = any_rank(bool(stop()))
    training.runtime.synchronise()
    training.tally.seconds += time.perf_counter() - began
    return not stopping


def _measure(
    training: Training, batches: Batches, callback: Callback, stop: Callable[[], int | None]
) -> Record | None:
    """The record of the interval that ends here; None if a stop signal comes before it is done."""
    callback.evaluating()
    training.synchronise_statistics()
    tally, peak = training.tally, peak_memory(training.runtime)
    means, active = tally.means(), training.active_counts().tolist()
    of_parts = evaluate_parts(training.model, batches, training.runtime, until=stop)
    validation, test = of_parts["validation"], of_parts["test"]
    if any_rank(bool(stop())):
        return None
    return Record(
        step=training.step,
        epoch=training.epoch,
        learning_rate=training.optimizer.param_groups[0]["lr"],
        train_loss=means.loss.item(),
        validation_loss=validation.loss,
        validation_error=validation.error,
        test_loss=test.loss,
        test_error=test.error,
        active_blocks=sum(n * count for n, count in enumerate(active)) / sum(active),
        expected_active_blocks=training.expected_active_blocks(),
        gradient_norm=means.gradient_norm.item(),
        gradient_mean=means.gradient_mean.item(),
        seconds=tally.seconds,
        images_per_second=sum(tally.images) / tally.seconds,
        peak_memory=peak,
        block_gradients=tally.block_means(training.blocks),
        active_counts={str(n): count for n, count in enumerate(active) if count},
    )


def peak_memory(runtime: Runtime) -> int:
    """Peak bytes: allocated on the GPU, or of the resident set of the process on a CPU."""
    if torch.device(runtime.device).type == "cuda":
        return torch.cuda.max_memory_allocated(runtime.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _save(run: Run, training: Training) -> None:
    training.synchronise_statistics()
    if not training.weights_are_finite():
        raise diverged(run, training.step, "a weight")

    def write() -> None:
        records = run.records()
        run.checkpoints.save(
            training.step,
            best_record(records).step if records else None,
            {**training.state_dict(), "journal_bytes": run.journal_length()},
        )

    on_primary(write)


def _write_weights(run: Run, training: Training, callback: Callback) -> None:
    """Write the final weights, unless they are there and undamaged."""
    if is_there(run.weights):
        try:
            read_weights(run.weights, run.id)
            return
        except RunError as error:
            callback.say(f"{error}; written anew")
    about = {"run": run.id, "recipe": run.config.recipe}
    write_weights(run.weights, training.model.state_dict(), about)


STOPPING = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, remember a SIGINT or SIGTERM; calling the object returns its number, or None.

    A second signal takes effect at once, as it would have without this.

    Args:
        numbers: the signals, where others are meant.
    """

    def __init__(self, numbers: Sequence[int] = STOPPING) -> None:
        self._numbers = numbers
        self._came: int | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> int | None:
        return self._came

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._remember) for number in self._numbers}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._came = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
