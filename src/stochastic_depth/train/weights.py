"""The weights at the end of a run: a safetensors file with a checksum."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stochastic_depth.errors import RunError
from stochastic_depth.files import reason, require_file, write_whole


def write_weights(path: Path, weights: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Write `weights` with `about` and a checksum of both as metadata.

    Raises:
        RunError: when it cannot be written.
    """
    tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    write_whole(path, save(tensors, metadata={**about, "sha256": _checksum(tensors, about)}))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, on the CPU.

    Raises:
        RunError: when the file is missing, truncated, altered, or has no checksum.
    """
    try:
        require_file(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise RunError(f"{path} cannot be read: {reason(error)}") from error
    except SafetensorError as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if about.pop("sha256", None) != _checksum(tensors, about):
        raise RunError(
            f"{path} is damaged, or older than checksums: going on with its run writes it anew"
        )
    return tensors


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(about.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
