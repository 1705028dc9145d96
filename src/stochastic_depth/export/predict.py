"""Classify pictures with the network of a run or of an exported file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.choices import CheckpointName
from stochastic_depth.data import normalise
from stochastic_depth.data.pictures import open_picture
from stochastic_depth.errors import ExportError
from stochastic_depth.export.description import Description, ImageInput, read_description
from stochastic_depth.export.load import load_export
from stochastic_depth.export.network import plain_network
from stochastic_depth.export.write import read_onnx
from stochastic_depth.extras import require
from stochastic_depth.files import LARGE, read_file, reading
from stochastic_depth.train import reopen


def read_pictures(paths: Sequence[Path], wanted: ImageInput) -> Tensor:
    """Read pictures as normalised input: float32 [pictures, channels, height, width].

    The shorter side is scaled and the middle is cut out. A picture that has the right size already
    stays as it is.

    Raises:
        DataError: when a file is not a picture, or is truncated; names the file.
        MissingExtraError: when Pillow is not installed.
    """
    pixels = torch.stack([_pixels(open_picture(path), wanted) for path in paths])
    return normalise(pixels, torch.tensor(wanted.mean), torch.tensor(wanted.std))


def _pixels(picture: Any, wanted: ImageInput) -> Tensor:
    """The pixels of a Pillow image: uint8 [channels, height, width]."""
    image = require("PIL.Image", "data")
    channels, height, width = wanted.shape
    short, long = sorted(picture.size)
    if short != wanted.shorter_side:
        scaled = max(1, int(wanted.shorter_side * long / short))
        upright = picture.width <= picture.height
        size = (wanted.shorter_side, scaled) if upright else (scaled, wanted.shorter_side)
        if wanted.scaling == "area" and short > wanted.shorter_side:
            # With this gap areas are averaged in one step, and rounded once, as in training.
            gap = None if short % wanted.shorter_side else 1.0
            picture = picture.resize(size, image.Resampling.BOX, reducing_gap=gap)
        else:
            picture = picture.resize(size, image.Resampling.BILINEAR)
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture.crop((left, top, left + width, top + height))
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(height, width, channels).permute(2, 0, 1)


Classifier = tuple[Callable[[Tensor], Tensor], Description]
"""A function from images, float32 [batch, channels, height, width], to logits [batch, classes]; and
the description of the network."""


def open_classifier(
    path: Path,
    depth: float = 1.0,
    which: CheckpointName = "best",
    data: Path | None = None,
) -> Classifier:
    """Open the network of a run folder, or of a safetensors or ONNX file that `export` wrote.

    Args:
        depth: the fraction of blocks to run, for a file exported with --elastic.
        which: for a run: the checkpoint with the lowest validation error, or the newest one.
        data: for a run: where its data is now; where it was when not given.

    Raises:
        ExportError: when the file is missing, damaged, or not one that export wrote, or has no such
            depth.
        RunError, DataError: when the folder or the data of the run cannot be used.
    """
    if path.suffix == ".safetensors":
        return load_export(path, depth)
    if depth != 1:
        raise ExportError(
            f"depth={depth}: {path} has one depth; stochastic-depth export RUN --elastic writes a "
            "safetensors file that has several"
        )
    if path.suffix == ".onnx":
        return _open_onnx(path)
    if path.is_file():
        raise ExportError(f"{path}: give a run folder, or a .safetensors or .onnx file")
    run, batches = reopen(path, data, device="cpu")  # where plain networks are
    plain = plain_network(run, batches, which)
    return plain.model, plain.description


def _open_onnx(path: Path) -> Classifier:
    with reading(path, ExportError):
        content = read_file(path, LARGE)
    try:
        network, description = read_onnx(content)
        return network, read_description(description)
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error
