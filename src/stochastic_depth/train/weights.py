"""Final weights: a safetensors file with a checksum and the identity of its run."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.errors import RunError
from stochastic_depth.extras import require
from stochastic_depth.files import is_there, reading, require_file, visible, write_whole


class DamagedFileError(Exception):
    """Raised when a file is not a complete safetensors file; the message is the reason."""


def read_safetensors(
    path: Path, error_class: type[Exception]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file, on the CPU. Nothing is unpickled.

    Raises:
        error_class: when the operating system cannot read the file.
        DamagedFileError: when it is not a complete safetensors file.
        MissingExtraError: when safetensors is not installed.
    """
    safetensors = require("safetensors", "train")
    try:
        with reading(path, error_class):
            require_file(path)
            with safetensors.safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError) as error:
        raise DamagedFileError(str(error)) from error


def write_weights(path: Path, weights: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Write `weights` with `about` and a checksum of both as metadata.

    Raises:
        RunError: when it cannot be written.
    """
    save = require("safetensors.torch", "train").save
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    write_whole(path, save(tensors, metadata={**about, "sha256": _checksum(tensors, about)}))


def read_weights(path: Path, run_id: str | None = None) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU.

    Args:
        run_id: the run to which they must belong; None accepts any.

    Raises:
        RunError: when the file is missing, truncated or altered, has no checksum, or belongs to
            another run.
    """
    try:
        about, tensors = read_safetensors(path, RunError)
    except DamagedFileError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if run_id is not None:
        _require_run(path, about, run_id)
    if about.pop("sha256", None) != _checksum(tensors, about):
        raise RunError(
            f"{path} is damaged, or older than checksums: resuming its run writes it again"
        )
    return tensors


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_weights_of(run_id: str, path: Path) -> None:
    """Raise an error if the weights at `path` belong to another run; a missing file is accepted.

    Raises:
        RunError: when they belong to another run, or cannot be read.
    """
    if not is_there(path):
        return
    try:
        about, _ = read_safetensors(path, RunError)
    except DamagedFileError:
        return  # resuming the run writes it again
    _require_run(path, about, run_id)


def _require_run(path: Path, about: Mapping[str, str], run_id: str) -> None:
    owner = about.get("run", "none")
    if owner != run_id:
        raise RunError(
            f"{path} belongs to another run ({visible(owner)[:40]}, not {run_id}): remove it, and "
            f"go on by stochastic-depth train --resume {path.parent}, which writes it again"
        )
