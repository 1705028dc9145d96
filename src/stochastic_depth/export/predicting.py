"""A network that classifies, wherever it is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from torch import Tensor

from stochastic_depth.errors import ExportError
from stochastic_depth.export.description import Description, read_description
from stochastic_depth.export.exporting import plain_network
from stochastic_depth.export.formats import read_onnx
from stochastic_depth.export.loading import load_export
from stochastic_depth.train import reopen

Classifier = tuple[Callable[[Tensor], Tensor], Description]
"""From images, float32 [batch, channels, height, width], to logits [batch, classes]."""


def open_classifier(
    path: Path,
    depth: float = 1.0,
    which: Literal["best", "last"] = "best",
    data: Path | None = None,
) -> Classifier:
    """The network of a run folder, or of a safetensors or ONNX file that `export` wrote.

    Args:
        depth: the share of blocks to run, of a file exported with --elastic.
        which: of a run: the checkpoint of the lowest validation error, or the newest.
        data: of a run: where its data is now.

    Raises:
        ExportError: when the file is missing, damaged, foreign, or has one depth only.
        RunError, DataError: when the folder or the data of the run is wrong.
    """
    if path.suffix == ".safetensors":
        return load_export(path, depth)
    if depth != 1:
        raise ExportError(
            f"depth={depth}: {path} has one depth; stochastic-depth export RUN --elastic writes a "
            "safetensors file that has several"
        )
    if path.suffix == ".onnx":
        return _of_onnx(path)
    if path.is_file():
        raise ExportError(f"{path}: give a run folder, or a .safetensors or .onnx file")
    run, images = reopen(path, data)
    plain = plain_network(run, images, which)
    return plain.model, plain.description


def _of_onnx(path: Path) -> Classifier:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    try:
        network, description = read_onnx(content)
        return network, read_description(description)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
