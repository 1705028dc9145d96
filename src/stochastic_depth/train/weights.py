"""Final weights: a safetensors file with a checksum and the identity of its run."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.errors import RunError
from stochastic_depth.extras import require
from stochastic_depth.files import is_there, reading, require_file, write_whole
from stochastic_depth.plain_text import command, escaped


@contextmanager
def _opened(path: Path, error_class: type[Exception]) -> Iterator[Any]:
    """Open a safetensors file; only its header is read so far.

    Raises:
        error_class: when it cannot be read, or is not a complete safetensors file.
        MissingExtraError: when safetensors is not installed.
    """
    safetensors = require("safetensors", "train")
    with reading(path, error_class):
        require_file(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file
        except (safetensors.SafetensorError, ValueError) as error:
            raise error_class(
                f"{path} is not a complete safetensors file ({error}), because it was cut short "
                "or changed: put a copy in its place"
            ) from error


def read_safetensors(
    path: Path, error_class: type[Exception]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a safetensors file, on the CPU. Nothing is unpickled.

    Raises:
        error_class: when it cannot be read, or is not a complete safetensors file.
        MissingExtraError: when safetensors is not installed.
    """
    with _opened(path, error_class) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_weights(path: Path, weights: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Write `weights` with `about` and a checksum of both as metadata.

    Raises:
        RunError: when it cannot be written.
    """
    save = require("safetensors.torch", "train").save
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    write_whole(path, save(tensors, metadata={**about, "sha256": checksum(tensors, about)}))


def read_weights(path: Path, run_id: str | None = None) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU.

    Args:
        run_id: the run to which they must belong; None accepts any.

    Raises:
        RunError: when the file is missing, truncated or altered, has no checksum, or belongs to
            another run.
    """
    about, tensors = read_safetensors(path, RunError)
    if run_id is not None:
        _require_run(path, about, run_id)
    if about.pop("sha256", None) != checksum(tensors, about):
        raise RunError(f"{path} is damaged, its checksum does not match: put a copy in its place")
    return tensors


def checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """sha256 of tensors on the CPU and of what is written about them: 64 hexadecimal digits."""
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_weights_of(run_id: str, path: Path) -> None:
    """Raise an error if the weights at `path` belong to another run, without reading them all.

    A missing or damaged file is accepted.

    Raises:
        RunError: when they belong to another run, or cannot be read.
    """
    if not is_there(path):
        return
    with reading(path, RunError):
        require_file(path)
    try:
        with _opened(path, RunError) as file:
            about = file.metadata() or {}
    except RunError:
        return  # it is damaged, and resuming the run writes it again
    _require_run(path, about, run_id)


def _require_run(path: Path, about: Mapping[str, str], run_id: str) -> None:
    owner = about.get("run", "none")
    if owner != run_id:
        raise RunError(
            f"{path} belongs to another run ({escaped(owner)[:40]}, not {run_id}): remove it; "
            f"it is written again by {command('train', '--resume', path.parent)}"
        )
