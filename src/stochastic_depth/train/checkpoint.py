"""Checkpoints: whole files with a checksum and the identity of their run."""

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stochastic_depth.errors import CheckpointError, RunError
from stochastic_depth.train.files import write_whole

MAGIC = b"stochastic-depth checkpoint 1\n"
_DIGEST = 64


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` to `path`: a header, the SHA-256 of what follows, a `torch.save` payload.

    Raises:
        CheckpointError: when it cannot be written; nothing is left of the attempt.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    try:
        write_whole(path, MAGIC + digest + b"\n" + payload)
    except RunError as error:
        raise CheckpointError(str(error)) from error


def load_checkpoint(path: Path, run_id: str, device: str = "cpu") -> dict[str, Any]:
    """The state in `path`, read without unpickling anything but tensors and plain values.

    Raises:
        CheckpointError: when the file is missing, truncated, altered, or of another run.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    start = len(MAGIC) + _DIGEST + 1
    if not content.startswith(MAGIC) or len(content) < start:
        raise CheckpointError(f"{path} is not a checkpoint of this library, or is cut short")
    payload = memoryview(content)[start:]
    if hashlib.sha256(payload).hexdigest().encode() != content[len(MAGIC) : start - 1]:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content")
    try:
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if state.get("run") != run_id:
        raise CheckpointError(f"{path} belongs to another run ({state.get('run')}, not {run_id})")
    return state


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run: the last `keep`, and the one of the best validation error."""

    folder: Path
    run_id: str
    keep: int

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}.ckpt"

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint, newest first."""
        return sorted((int(p.stem[5:]) for p in self.folder.glob("step-*.ckpt")), reverse=True)

    def save(self, step: int, best: int | None, state: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, then delete those that are neither recent nor `best`.

        Raises:
            CheckpointError: naming the previous checkpoint, which is intact.
        """
        try:
            save_checkpoint(self.path(step), {"run": self.run_id, "step": step, **state})
        except CheckpointError as error:
            before = self.steps()
            kept = f"{self.path(before[0])} is intact" if before else "there was none before"
            raise CheckpointError(f"{error}; {kept}") from error
        for old in self.steps()[self.keep :]:
            if old != best:
                self.path(old).unlink(missing_ok=True)

    def newest(self, device: str) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest state that can be trusted, and why newer ones could not be.

        Raises:
            CheckpointError: when there are checkpoints and none of them can be trusted.
        """
        refused: list[str] = []
        for step in self.steps():
            try:
                return load_checkpoint(self.path(step), self.run_id, device), refused
            except CheckpointError as error:
                refused.append(str(error))
        if refused:
            raise CheckpointError("no checkpoint can be trusted: " + "; ".join(refused))
        return None, []
