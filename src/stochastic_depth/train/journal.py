"""The journal of a run: a line of JSON for each evaluation, append-only, always readable."""

import dataclasses
import errno
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stochastic_depth.errors import RunError
from stochastic_depth.files import LARGE, is_there, open_for_appending, read_file, reading, reason


@dataclass(frozen=True)
class Record:
    """One interval of training (an epoch, unless `evaluate_every` is set) and its evaluation.

    Losses are mean cross-entropies in nats, errors are percent. `seconds`, `images_per_second` and
    `peak_memory` depend on the machine; all other fields are the same whenever the run is repeated.
    """

    step: int
    """Steps done since the start of the run."""
    epoch: float
    """Passes over the training images done since the start of the run."""
    learning_rate: float
    """Learning rate of the interval's last step."""
    train_loss: float
    validation_loss: float
    validation_error: float
    test_loss: float
    test_error: float
    active_blocks: float
    """How many blocks ran, averaged over the steps of the interval (or over its samples)."""
    expected_active_blocks: float
    """The sum of p_l, averaged over the steps of the interval."""
    gradient_norm: float
    """The L2 norm of the gradient at the first convolution, averaged over the steps of the
    interval."""
    gradient_mean: float
    """The mean absolute gradient at the first convolution, averaged over the steps of the
    interval."""
    seconds: float
    """Seconds of training, without evaluation."""
    images_per_second: float
    peak_memory: int
    """Peak bytes: allocated on the device, or resident in the process on a CPU."""
    block_gradients: list[float | None]
    """For each residual block, the mean absolute gradient at its first convolution, averaged over
    the sampled steps of the interval in which the block was open; None if it was open in none.
    Every tenth step is sampled, and more often where an interval has fewer than 50 steps."""
    active_counts: dict[str, int]
    """In how many steps of the interval n blocks were active, by n as text. With gates for single
    samples, the number of samples; with per-rank gates, the steps of all processes."""

    @property
    def is_finite(self) -> bool:
        """Whether no value is nan or infinite."""
        values = [*vars(self).values(), *self.block_gradients]
        return all(math.isfinite(value) for value in values if isinstance(value, float))


def best_record(records: list[Record]) -> Record:
    """The record with the lowest validation error; the earliest of several."""
    return min(records, key=lambda record: (record.validation_error, record.step))


def append_record(path: Path, record: Record) -> None:
    """Append a line; it is on disk when this returns.

    Raises:
        RunError: when it cannot be written; the journal is then as it was before.
    """
    line = json.dumps(dataclasses.asdict(record)).encode() + b"\n"
    try:
        # Unbuffered, because closing would write a buffer again and leave half a line behind.
        with open_for_appending(path) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), before)
                raise
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error


def truncate_journal(path: Path, length: int) -> None:
    """Cut off the lines after a checkpoint, because their work is about to be repeated.

    Raises:
        RunError: when the journal is shorter than it was at the checkpoint, or cannot be written.
    """
    if length == 0 and not is_there(path):
        return
    try:
        with open_for_appending(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found > length:
                os.ftruncate(file.fileno(), length)
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error
    if found < length:
        raise RunError(
            f"{path} has {found} bytes, it had {length} when the checkpoint was written: lines are "
            "missing"
        )


def read_journal(path: Path) -> list[Record]:
    """All complete lines; none if there is no file. A line that is being written is left out.

    Raises:
        RunError: when a line is not a record; names the line.
    """
    if not is_there(path):
        return []
    with reading(path, RunError):
        lines = read_file(path, LARGE).split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{path}, line {number} is not a record: {error}") from error
    return records


def _record(values: Any) -> Record:
    record = Record(**values)
    for item in dataclasses.fields(Record):
        value = getattr(record, item.name)
        if item.type in (int, float) and type(value) not in (int, float):
            raise TypeError(f"{item.name} is {value!r}, expected a number")
    return record
