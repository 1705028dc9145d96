"""Pictures of any size, as a network was trained to see them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.data import normalise
from stochastic_depth.data.folder_images import open_picture
from stochastic_depth.errors import DataError
from stochastic_depth.export.description import Input
from stochastic_depth.extras import require

LONGEST = 20
"""Times the shorter side: what is longer would need too much memory to scale, and shows nothing."""


def read_pictures(paths: Sequence[Path], wanted: Input) -> Tensor:
    """Float32 [pictures, channels, height, width], normalised.

    The shorter side is scaled, the middle cut out; a picture of the right size stays as it is.

    Raises:
        DataError: naming the file that is no picture, or not a whole one.
        MissingExtraError: when Pillow is not installed.
    """
    pixels = torch.stack([_pixels(path, open_picture(path), wanted) for path in paths])
    return normalise(pixels, torch.tensor(wanted.mean), torch.tensor(wanted.std))


def _pixels(path: Path, picture: Any, wanted: Input) -> Tensor:
    """uint8 [channels, height, width] of a Pillow image."""
    image = require("PIL.Image", "data")
    channels, height, width = wanted.shape
    short, long = sorted(picture.size)
    if long > LONGEST * short:
        raise DataError(
            f"{path}: a picture of {picture.width}x{picture.height} pixels: give one that is at "
            f"most {LONGEST} times as long as it is wide"
        )
    if short != wanted.shorter_side:
        scaled = max(1, int(wanted.shorter_side * long / short))
        upright = picture.width <= picture.height
        size = (wanted.shorter_side, scaled) if upright else (scaled, wanted.shorter_side)
        picture = picture.resize(size, image.Resampling.BILINEAR)
    left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = picture.crop((left, top, left + width, top + height))
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(height, width, channels).permute(2, 0, 1)
