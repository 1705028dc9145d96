"""Errors that end a run, and the recorded ones.

They name the step, its gates and the last good checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

from torch import Tensor

from stochastic_depth.data.folder_batches import is_worker_death, worker_death
from stochastic_depth.draw import open_shares
from stochastic_depth.errors import (
    DivergedError,
    EngineError,
    Interrupted,
    OutOfMemoryError,
    RunError,
    first_line,
    is_out_of_memory,
)
from stochastic_depth.files import SMALL, read_file
from stochastic_depth.torch_private import is_compiler_error
from stochastic_depth.train import layout
from stochastic_depth.train.run_folder import Run
from stochastic_depth.train.train_state import TrainState


def diverged(run: Run, step: int, what: str) -> DivergedError:
    """The error for a value that is not finite, in `step` or after it."""
    remedies = "a lower --optimizer.learning-rate or a --optimizer.warmup-epochs"
    if run.config.survival.rule != "constant":
        remedies += ", or --schedule warmup"
    return DivergedError(
        f"{what} is not finite at step {step} of {run.path}; {run.checkpoints.last_good()}. Try "
        f"{remedies}"
    )


def failure_of(run: Path, inside: Path | None = None) -> str | None:
    """The recorded reason why the run in a folder cannot be trained; None if there is none.

    Args:
        inside: the folder above it that is trusted, as for `read_file`.

    Raises:
        RunError: when the reason cannot be read.
    """
    path = run / layout.FAILED
    try:
        return read_file(path, SMALL, inside=inside).decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


@contextmanager
def as_out_of_memory_error(
    run: Run, train_state: TrainState, evaluating: bool = False
) -> Iterator[None]:
    """Turn errors of exhausted memory into one that names the step and the remedies.

    Args:
        evaluating: whether this is an evaluation, after the step.

    Raises:
        OutOfMemoryError: in place of the errors of PyTorch and Python.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if is_worker_death(error):
            raise worker_death(error) from error
        if not is_out_of_memory(error):
            raise
        step, config = train_state.step, train_state.config
        gates = "in evaluation" if evaluating else open_blocks(train_state.gates_at(step))
        workers = f", --data.workers ({config.data.workers})" * (
            "data.workers" not in config.without_effect()
        )
        precision = " or --precision bfloat16" * (train_state.runtime.precision == "float32")
        raise OutOfMemoryError(
            f"out of memory at step {step} of {run.path} ({gates}): {first_line(error)[:200]}; "
            f"{run.checkpoints.last_good()}. Resume where there is more memory, or begin a run "
            f"with a lower --optimizer.batch (it is {config.optimizer.batch}){workers}{precision}"
        ) from error


@contextmanager
def as_interruption(
    run: Run, train_state: TrainState, stop: Callable[[], int | None]
) -> Iterator[None]:
    """Turn any error into the interruption, if a stop signal was received.

    A signal that all processes of a terminal get also ends compilers and those that decode
    pictures, so that the step fails before it is over.

    Raises:
        Interrupted: in place of errors that are not about the run itself.
    """
    try:
        yield
    except Exception as error:
        about_run = isinstance(error, RunError) and not isinstance(error, OutOfMemoryError)
        if about_run or not (signal := stop()):
            raise
        raise Interrupted(run.path, train_state.step, signal, has_checkpoint=False) from error


@contextmanager
def as_engine_error() -> Iterator[None]:
    """Turn errors of PyTorch's compiler, of over a thousand lines, into a short one.

    Raises:
        EngineError: in place of the errors of PyTorch's compiler.
    """
    try:
        yield
    except Exception as error:
        if not is_compiler_error(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        why = next((line for line in lines if ": error:" in line), first_line(error))
        raise EngineError(
            f"PyTorch's compiler has failed ({why[:300]}): begin a run with --engine eager; or "
            "repair its compiler, which the environment variable CXX names, and resume this run"
        ) from error


def open_blocks(gates: Tensor) -> str:
    """The open blocks, as "blocks 1-3, 5 of 9 open".

    Args:
        gates: bool [L]; or [L, batch], where a block counts as open if it is open for any sample.
    """
    numbers = (1 + open_shares(gates).nonzero().flatten()).tolist()
    if not numbers:
        return f"none of {len(gates)} blocks open"
    runs = [list(group) for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    ranges = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs]
    return f"blocks {', '.join(ranges)} of {len(gates)} open"
