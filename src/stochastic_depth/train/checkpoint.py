"""Checkpoints: files with a checksum and the identity of their run."""

import hashlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stochastic_depth.errors import CheckpointError, RunError
from stochastic_depth.files import (
    make_folder,
    names_in,
    open_file,
    reading,
    reason,
    remove_file,
    write_whole,
)
from stochastic_depth.train.layout import JOURNAL

MAGIC = b"stochastic-depth checkpoint 1\n"
_DIGEST = 64
_NAME = re.compile(r"step-([0-9]{9,})\.ckpt")
_NAMES_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Za-z0-9]+Storage"
)
"""The only global names that a pickled state of tensors and plain values contains."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`: a header, the SHA-256 of the payload, and a `torch.save` payload.

    Raises:
        CheckpointError: when it cannot be written; the attempt leaves nothing behind.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    try:
        write_whole(path, MAGIC + digest + b"\n" + payload, inside=path.parent.parent)
    except RunError as error:
        raise CheckpointError(str(error)) from error


def load_checkpoint(path: Path, run_id: str, device: str = "cpu") -> dict[str, Any]:
    """Read the state in `path`, unpickling nothing but tensors and plain values.

    Raises:
        CheckpointError: when the file is missing, truncated or altered, or belongs to another run.
    """
    with reading(path, CheckpointError):
        payload = _read_payload(path)
    try:
        file = io.BytesIO(payload)
        _check_entries(file, len(payload))
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        # Hostile content with a valid checksum can make the reader raise nearly any error.
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        raise CheckpointError(f"{path} is not the state of a run")
    if state.get("run") != run_id:
        raise CheckpointError(f"{path} belongs to another run ({state.get('run')}, not {run_id})")
    return state


def _read_payload(path: Path) -> bytes:
    """The bytes after the header, which are read into memory only if their checksum is right.

    Raises:
        CheckpointError: when the file is not a checkpoint, or is damaged.
        OSError: when it cannot be read.
    """
    with _open_intact(path) as file:
        return file.read()


@contextmanager
def _open_intact(path: Path) -> Iterator[BinaryIO]:
    """The file after its header, if its checksum is right; it is not read into memory for that.

    Raises:
        CheckpointError, OSError: as `_read_payload`.
    """
    with open_file(path, inside=path.parent.parent) as file:
        header = file.read(len(MAGIC) + _DIGEST + 1)
        if not header.startswith(MAGIC) or len(header) < len(MAGIC) + _DIGEST + 1:
            raise CheckpointError(f"{path} is not a checkpoint of this library, or is cut short")
        digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
        if digest + b"\n" != header[len(MAGIC) :]:
            raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
        file.seek(len(header))
        yield file


def _check_entries(file: io.BytesIO, size: int) -> None:
    """Refuse content that would allocate far more than the file has, even with `weights_only=True`.

    Such content has compressed entries, or calls that tensors do not need (`bytearray`, for
    example).

    Raises:
        pickle.UnpicklingError: naming the entry or call.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise pickle.UnpicklingError("an entry is compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise pickle.UnpicklingError("its entries claim more bytes than there are")
        (pickled,) = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        content = archive.read(pickled)
    for operation, argument, _ in pickletools.genops(content):
        if "GLOBAL" in operation.name and not _NAMES_OF_TENSORS.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"it asks for {str(argument)[:80]}")
    file.seek(0)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: the last `keep`, and the one with the best validation error."""

    folder: Path
    run_id: str
    keep: int

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.ckpt"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, the newest first."""
        with reading(self.folder, CheckpointError):
            matches = map(_NAME.fullmatch, names_in(self.folder))
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def save(self, step: int, best: int | None, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete those that are neither recent nor `best`.

        Raises:
            CheckpointError: when it cannot be written; names the last good one.
        """
        try:
            _create(self.folder)
            save_checkpoint(self.path(step), {"run": self.run_id, "step": step, **state})
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self.last_good()}") from error
        # Checkpoints of later steps were refused when the run was resumed.
        past = [other for other in self.steps() if other <= step]
        for old in past[self.keep :]:
            if old != best:
                with suppress(OSError):
                    remove_file(self.path(old), inside=self.folder.parent)

    def load(self, step: int, device: str) -> dict[str, Any]:
        """The state after `step` steps.

        Raises:
            CheckpointError: as `load_checkpoint`, and when the file belongs to a different step.
        """
        path = self.path(step)
        state = load_checkpoint(path, self.run_id, device)
        if state["step"] != step:
            raise CheckpointError(f"{path} belongs to step {state['step']}: it was renamed")
        return state

    def newest(self, device: str) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest undamaged state, and the reasons why newer ones were refused.

        Raises:
            CheckpointError: when there are checkpoints and none of them can be trusted.
        """
        refused: list[str] = []
        for step in self.steps():
            try:
                return self.load(step, device), refused
            except CheckpointError as error:
                refused.append(str(error))
        if refused:
            raise CheckpointError(
                f"no checkpoint can be trusted: {'; '.join(refused)}. Put a copy of {self.folder} "
                f"in its place; or delete it and {self.folder.with_name(JOURNAL)}, and "
                "resume: the run begins at step 0"
            )
        return None, []

    def last_good(self) -> str:
        """A phrase that names the newest undamaged checkpoint; it is not loaded, because this is
        also said where memory has run out."""
        with suppress(CheckpointError):
            for step in self.steps():
                with suppress(CheckpointError, OSError), _open_intact(self.path(step)):
                    return f"the last good checkpoint is {self.path(step)}"
        return "there is no good checkpoint before it"


def _create(folder: Path) -> None:
    try:
        make_folder(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be created: {reason(error)}") from error


@contextmanager
def as_checkpoint_error(step: int) -> Iterator[None]:
    """Turn errors while the state of a checkpoint is loaded into one sentence.

    Raises:
        CheckpointError: when the state does not fit the network.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint of step {step} does not fit this network: {error}"
        ) from error
