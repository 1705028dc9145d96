"""The training loop: an iterator over the records of a run, which can be resumed at any step."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from stochastic_depth.data import Batches
from stochastic_depth.distributed.world import any_rank, on_primary, world_size
from stochastic_depth.errors import CheckpointError, Interrupted, RunError
from stochastic_depth.files import is_there
from stochastic_depth.processes import peak_resident
from stochastic_depth.train.checkpoint import as_checkpoint_error
from stochastic_depth.train.failures import (
    as_engine_error,
    as_interruption,
    as_out_of_memory_error,
    diverged,
    open_blocks,
)
from stochastic_depth.train.journal import Record, append_record, best_record, truncate_journal
from stochastic_depth.train.open import require_batches_of
from stochastic_depth.train.resumption import conditions_elsewhere, say_what_differs
from stochastic_depth.train.run_folder import Run, remove_untrained_on_error
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import IntervalMetrics, evaluate_parts
from stochastic_depth.train.train_state import TrainState
from stochastic_depth.train.weights import read_weights, write_weights

_STEPS_BETWEEN_CHECKS = 50
"""How many steps lie between checks of the loss on a GPU, with which reading a loss synchronises.
On a CPU every step is checked."""


class Callback(Protocol):
    """Methods that `fit` calls while a run trains."""

    def begin(self, run: Run, train_state: TrainState) -> None:
        """Called once, before the first step; `train_state` is at the newest checkpoint, if any."""
        ...

    def step(self, train_state: TrainState, loss: Tensor) -> None:
        """Called after each step with its loss, [], which stays on the device."""
        ...

    def evaluating(self) -> None:
        """Called before each evaluation."""
        ...

    def record(self, record: Record) -> None:
        """Called with each record, when it and its checkpoint are written."""
        ...

    def say(self, text: str) -> None:
        """Called with a sentence on something unusual, such as a damaged checkpoint."""
        ...


def fit(
    run: Run,
    batches: Batches,
    callback: Callback,
    stop: Callable[[], int | None] = lambda: None,
) -> Iterator[Record]:
    """Train `run` from its newest checkpoint to its end, yielding each record as it is written.

    If it is killed at any instant, at most the work since the last checkpoint is lost. If it is
    called again, its results on a CPU are bitwise those of a run without interruption.

    Args:
        run: the folder to write.
        batches: those that `begin` or `reopen` has returned with the run.
        callback: called after every step and with every record.
        stop: called after every step; when it returns the number of a signal, the run writes a
            checkpoint and stops.

    Raises:
        RunError: when another process writes the folder, the folder is removed or cannot be
            written, or the batches are not those of the run.
        CheckpointError: when no checkpoint can be trusted, or one cannot be written.
        DataError: when something, such as a picture, cannot be read. If there is neither a record
            nor a checkpoint yet, the folder is removed.
        DivergedError: when a loss or a weight is not finite.
        OutOfMemoryError: when a step or an evaluation needs more memory than there is, or a process
            that decodes pictures has died.
        EngineError: when PyTorch's compiler fails.
        Interrupted: when `stop` has returned a signal; in place of the errors that a signal causes.
    """
    require_batches_of(run, batches)
    with remove_untrained_on_error([run]), ExitStack() as stack:
        check_lock = stack.enter_context(_writing(run))
        train_state = TrainState(run.config, run.runtime, batches)
        stack.enter_context(as_engine_error())
        stack.enter_context(as_out_of_memory_error(run, train_state))
        journal, records = _restore(run, train_state, callback)
        here = on_primary(lambda: conditions_elsewhere(run))
        if here or not train_state.metrics.images:  # or a part of the interval was elsewhere
            train_state.elsewhere = here
        _say_if_rounded(train_state, callback)
        callback.begin(run, train_state)
        stream = _stream(batches, train_state.step)
        while train_state.step < train_state.total_steps or train_state.metrics.images:
            record = None
            with as_interruption(run, train_state, stop):
                if _finish_interval(run, train_state, stream, callback, stop):
                    with as_out_of_memory_error(run, train_state, evaluating=True):
                        record = _measure(train_state, batches, callback, stop)
            check_lock()
            if record is not None and not record.is_finite:
                raise diverged(run, train_state.step, "an evaluation")
            journal = on_primary(partial(_write_record, run, record, journal))
            if record is None:
                _save(run, train_state, journal, records)
                raise Interrupted(run.path, train_state.step, stop() or 0)
            records.append(record)
            train_state.metrics, train_state.elsewhere = IntervalMetrics(), here
            _save(run, train_state, journal, records)
            callback.record(record)
            yield record
        check_lock()
        on_primary(lambda: _write_weights(run, train_state, callback))


@contextmanager
def _writing(run: Run) -> Iterator[Callable[[], None]]:
    """Enter `run.writing()` in the first process; the check that it yields works in all of them."""
    checks: list[Callable[[], None]] = []
    with ExitStack() as stack:
        on_primary(lambda: checks.append(stack.enter_context(run.writing())))
        yield lambda: on_primary(lambda: checks[0]())


def _restore(run: Run, train_state: TrainState, callback: Callback) -> tuple[str, list[Record]]:
    """Load the newest checkpoint and cut the journal after it.

    Returns:
        The checksum of the journal's last line (the identity of the run if there is none), and the
        records.
    """
    # If several processes train, only the first needs access to the folder.
    device = run.runtime.device if world_size() == 1 else "cpu"
    state, refused = on_primary(lambda: run.checkpoints.newest(device))
    for reason in refused:
        callback.say(f"{reason}; using the one before it")
    if state is not None:
        say_what_differs(run, callback.say)
        train_state.load_state_dict(state)
        with as_checkpoint_error(state["step"]):
            last = state["journal"]
    else:
        on_primary(lambda: _require_begun_only(run))
        last = run.id
    on_primary(lambda: truncate_journal(run.journal, run.id, last))
    return last, on_primary(run.records)


def _say_if_rounded(train_state: TrainState, callback: Callback) -> None:
    """Let `callback` say what the gates would warn of, with the options of the command line."""
    if train_state.handle is not None:
        train_state.handle.on_rounding = lambda sentence: callback.say(
            f"{sentence}: begin a run with --survival.scale training, which divides by the share "
            "itself, or with a larger --optimizer.batch"
        )


def _require_begun_only(run: Run) -> None:
    """Refuse to begin a run again, and to cut its journal, because its checkpoints were removed.

    A run that was killed before its first checkpoint has at most one record.

    Raises:
        CheckpointError: when it has more records, or final weights.
    """
    records = run.records()
    if records and is_there(run.weights):
        raise CheckpointError(
            f"{run.path} is finished and has no checkpoints left, so it cannot be resumed; nothing "
            "was changed"
        )
    if len(records) > 1:
        raise CheckpointError(
            f"{run.path} has {len(records)} records and no checkpoints; nothing was changed. Put a "
            f"copy of {run.checkpoints.folder} in its place; or delete {run.journal} as well, and "
            "resume: the run begins at step 0"
        )


def _stream(batches: Batches, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch, start = divmod(step, batches.steps_per_epoch)
    while True:
        yield from batches.train(epoch, start)
        epoch, start = epoch + 1, 0


def _finish_interval(
    run: Run,
    train_state: TrainState,
    stream: Iterator[tuple[Tensor, Tensor]],
    callback: Callback,
    stop: Callable[[], int | None],
) -> bool:
    """Train up to the next evaluation; returns False if a stop signal comes first."""
    end = min(train_state.total_steps, train_state.interval_start + train_state.interval)
    check_every = _STEPS_BETWEEN_CHECKS if train_state.runtime.on_gpu else 1
    began = time.perf_counter()
    stopping = any_rank(bool(stop()))
    while train_state.step < end and not stopping:
        measured = train_state.advance(*next(stream))
        callback.step(train_state, measured.loss)
        is_due = train_state.step % check_every == 0 or train_state.step == end
        if is_due or (stop() and world_size() == 1):
            position = train_state.metrics.first_diverged(check_every)
            if position is not None:
                step = train_state.interval_start + position
                gates = open_blocks(train_state.gates_at(step))
                raise diverged(run, step, f"with {gates}, the loss")
            stopping = any_rank(bool(stop()))
    train_state.runtime.synchronise()
    train_state.metrics.seconds += time.perf_counter() - began
    return not stopping


def _measure(
    train_state: TrainState, batches: Batches, callback: Callback, stop: Callable[[], int | None]
) -> Record | None:
    """The record of the interval that ends here; None if a stop signal comes before it is ready."""
    callback.evaluating()
    train_state.synchronise_statistics()
    metrics, peak = train_state.metrics, peak_memory(train_state.runtime)
    means, active = metrics.means(), train_state.active_counts().tolist()
    evaluations = evaluate_parts(train_state.model, batches, train_state.runtime, until=stop)
    validation, test = evaluations["validation"], evaluations["test"]
    if any_rank(bool(stop())):
        return None
    return Record(
        step=train_state.step,
        epoch=train_state.epoch,
        learning_rate=train_state.optimizer.param_groups[0]["lr"],
        train_loss=means.loss.item(),
        validation_loss=validation.loss,
        validation_error=validation.error,
        test_loss=test.loss,
        test_error=test.error,
        active_blocks=sum(n * count for n, count in enumerate(active)) / sum(active),
        expected_active_blocks=train_state.expected_active_blocks(),
        gradient_norm=means.gradient_norm.item(),
        gradient_mean=means.gradient_mean.item(),
        seconds=metrics.seconds,
        images_per_second=sum(metrics.images) / metrics.seconds,
        peak_memory=peak,
        block_gradients=metrics.block_means(train_state.blocks),
        active_counts={str(n): count for n, count in enumerate(active) if count},
        elsewhere=train_state.elsewhere,
    )


def peak_memory(runtime: Runtime) -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process on a CPU."""
    if runtime.on_gpu:
        return torch.cuda.max_memory_allocated(runtime.device)
    return peak_resident()


def _write_record(run: Run, record: Record | None, journal: str) -> str:
    """Append a record, if there is one, to a journal that ends with the checksum `journal`.

    Lines that another process has added are cut off; missing ones are an error.

    Returns:
        The checksum of its last line.
    """
    truncate_journal(run.journal, run.id, journal)
    return journal if record is None else append_record(run.journal, record, journal)


def _save(run: Run, train_state: TrainState, journal: str, records: list[Record]) -> None:
    train_state.synchronise_statistics()
    if not train_state.weights_are_finite():
        raise diverged(run, train_state.step, "a weight")
    best = best_record(records).step if records else None
    state = {**train_state.state_dict(), "journal": journal}
    on_primary(lambda: run.checkpoints.save(train_state.step, best, state))


def _write_weights(run: Run, train_state: TrainState, callback: Callback) -> None:
    """Write the final weights, unless they are already there and undamaged."""
    damage = None
    if is_there(run.weights):
        try:
            read_weights(run.weights, run.id)
            return
        except RunError as error:
            damage = error
    about = {"run": run.id, "recipe": run.config.recipe}
    write_weights(run.weights, train_state.model.state_dict(), about)
    if damage is not None:
        callback.say(f"{damage}; written again")
