"""The journal of a run: a line of JSON for each evaluation, append-only, always readable.

Each line ends with a SHA-256 of the line before it and of itself; the first line begins with the
identity of the run in place of a line before. So a line that was changed, repeated, removed, or
copied from another run is noticed by everything that reads the journal, except for lines that are
missing at its end, which `truncate_journal` notices.
"""

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stochastic_depth.errors import RunError
from stochastic_depth.files import (
    LARGE,
    is_there,
    open_for_appending,
    read_file,
    reading,
    reason,
    sync_folder,
)

_LINE = re.compile(rb'(\{.*), "sha256": "([0-9a-f]{64})"\}')


@dataclass(frozen=True)
class Record:
    """One interval of training (an epoch, unless `evaluate_every` is set) and its evaluation.

    Losses are mean cross-entropies in nats, errors are percent. `seconds`, `images_per_second` and
    `peak_memory` depend on the machine, and `elsewhere` on the resumptions; all other fields are
    the same whenever the run is repeated.
    """

    step: int
    """Steps done since the start of the run."""
    epoch: float
    """Passes over the training images done since the start of the run."""
    learning_rate: float
    """Learning rate of the interval's last step."""
    train_loss: float
    """The mean over the interval's images of the loss of their training step, under its gates."""
    validation_loss: float
    validation_error: float
    test_loss: float
    test_error: float
    active_blocks: float
    """How many blocks ran, averaged over the steps of the interval (or over its samples)."""
    expected_active_blocks: float
    """The sum of p_l, averaged over the steps of the interval (or over its samples). Where a block
    runs on a rounded share of the samples, that share counts in place of p_l."""
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
    """Peak bytes of the process since it began, other runs in it included: allocated on the device,
    or resident on a CPU."""
    block_gradients: list[float | None]
    """For each residual block, the mean absolute gradient at its first convolution, averaged over
    the sampled steps of the interval in which the block was open; None if it was open in none.
    Every tenth step is sampled, and more often where an interval has fewer than 50 steps."""
    active_counts: dict[str, int]
    """In how many steps of the interval n blocks were active, by n as text. With gates for single
    samples, the number of samples; with per-rank gates, the steps of all processes."""
    elsewhere: dict[str, str] | None = None
    """The `timing_conditions` of the interval, if they are not those under which the run began: it
    was resumed by another number of processes, for example."""

    @property
    def is_finite(self) -> bool:
        """Whether no value is nan or infinite."""
        values = [*vars(self).values(), *self.block_gradients]
        return all(math.isfinite(value) for value in values if isinstance(value, float))


def best_record(records: list[Record]) -> Record:
    """The record with the lowest validation error; the earliest of several."""
    return min(records, key=lambda record: (record.validation_error, record.step))


def append_record(path: Path, record: Record, before: str) -> str:
    """Append a line; it is on disk when this returns.

    Args:
        before: the checksum of the last line, or the identity of the run where there is no line.

    Returns:
        The checksum of the new line.

    Raises:
        RunError: when it cannot be written; the journal is then as it was before.
    """
    shown = dataclasses.asdict(record)
    if record.elsewhere is None:  # as nearly always
        del shown["elsewhere"]
    values = json.dumps(shown).encode().removesuffix(b"}")
    checksum = _checksum(before, values)
    line = values + f', "sha256": "{checksum}"}}\n'.encode()
    try:
        # Unbuffered, because closing would write a buffer again and leave half a line behind.
        with open_for_appending(path) as file:
            length = os.fstat(file.fileno()).st_size
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
                if length == 0:  # it may be new
                    sync_folder(path.parent)
            except OSError:
                os.ftruncate(file.fileno(), length)
                raise
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error
    return checksum


def truncate_journal(path: Path, run_id: str, last: str) -> None:
    """Cut off the lines after a checkpoint, because their work is about to be repeated.

    Args:
        last: the checksum of the last line that is kept, or `run_id` to keep none.

    Raises:
        RunError: when a line was changed or that last line is missing; then nothing is cut. And
            when the journal cannot be written.
    """
    lines = _read_lines(path, run_id)
    length = 0
    if last != run_id:
        checksums = [checksum for _, checksum in lines]
        if last not in checksums:
            left = max((record.step for record in read_journal(path, run_id)), default=0)
            raise RunError(
                f"{path} does not have the line that was its last one when the checkpoint was "
                "written: lines are missing. Nothing was changed; put the original back, or delete "
                f"the checkpoints of steps after {left}, and resume"
            )
        length = sum(len(line) + 1 for line, _ in lines[: checksums.index(last) + 1])
    if not is_there(path):
        return
    try:
        with open_for_appending(path) as file:
            if os.fstat(file.fileno()).st_size > length:
                os.ftruncate(file.fileno(), length)
    except OSError as error:
        raise RunError(f"{path} could not be written: {reason(error)}") from error


def read_journal(path: Path, run_id: str) -> list[Record]:
    """All complete lines; none if there is no file. A line that is being written is left out.

    Raises:
        RunError: when a line is not a record of this run, or was changed; names the line.
    """
    records = []
    for number, (line, _) in enumerate(_read_lines(path, run_id), start=1):
        try:
            values = json.loads(line)
            del values["sha256"]
            records.append(_record(values))
        except (ValueError, TypeError, RecursionError) as error:
            raise RunError(f"{path}, line {number} is not a record: {error}") from error
    return records


def _read_lines(path: Path, run_id: str) -> list[tuple[bytes, str]]:
    """All complete lines and their checksums.

    Raises:
        RunError: when a checksum does not match; names the line.
    """
    if not is_there(path):
        return []
    with reading(path, RunError):
        content = read_file(path, LARGE).split(b"\n")[:-1]
    lines, before = [], run_id
    for number, line in enumerate(content, start=1):
        match = _LINE.fullmatch(line)
        if match is None or _checksum(before, match[1]) != match[2].decode():
            raise RunError(
                f"{path}, line {number} is not a record as this run wrote it: it was changed, or "
                "lines before it were; put the original back"
            )
        before = match[2].decode()
        lines.append((line, before))
    return lines


def _checksum(before: str, values: bytes) -> str:
    return hashlib.sha256(before.encode() + values).hexdigest()


def _record(values: Any) -> Record:
    record = Record(**values)
    for item in dataclasses.fields(Record):
        value = getattr(record, item.name)
        if item.type in (int, float) and type(value) not in (int, float):
            raise TypeError(f"{item.name} is {value!r}, expected a number")
    return record
