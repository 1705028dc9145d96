"""Street View House Numbers, cropped digits (Netzer et al., 2011), as MATLAB files."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.data.dataset import Images, check_count, per_class, stratified
from stochastic_depth.data.folders import contents
from stochastic_depth.data.mat5 import read_arrays
from stochastic_depth.errors import DataError

VALIDATION = 6_000
FILES = ("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat")


@dataclass(frozen=True)
class SvhnFiles:
    """The three files; the training set of the paper is `train` and `extra` together."""

    train: Images
    extra: Images
    test: Images


def has_svhn(root: Path) -> bool:
    return all((root / name).is_file() for name in FILES)


def read_svhn(root: Path) -> SvhnFiles:
    """Read train_32x32.mat, extra_32x32.mat and test_32x32.mat.

    Raises:
        DataError: names the file that is missing or not as expected.
    """
    for name in FILES:
        if not (root / name).is_file():
            raise DataError(
                f"{root / name}: missing; the training set is train and extra together, and all "
                f"of {', '.join(FILES)} are needed (ufldl.stanford.edu/housenumbers, format 2). "
                f"Found {contents(root)}"
            )
    return SvhnFiles(*(read_mat(root / name) for name in FILES))


def read_mat(path: Path) -> Images:
    """One file: X, uint8 [32, 32, 3, n], and y, [n, 1], in which 10 is the digit 0."""
    try:
        arrays = read_arrays(path)
    except (OSError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: no readable MATLAB 5 file ({error}): fetch it again") from error
    for name in ("X", "y"):
        if name not in arrays:
            raise DataError(
                f"{path}: arrays {', '.join(arrays) or 'none'}, expected X and y: fetch it again"
            )
    pixels, labels = arrays["X"], arrays["y"]
    if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, 32, 32):
        raise DataError(
            f"{path}: X is {pixels.dtype} {list(reversed(pixels.shape))}, expected uint8 "
            "[32, 32, 3, n]: fetch the cropped digits, format 2"
        )
    if len(pixels) == 0 or labels.numel() != len(pixels):
        raise DataError(
            f"{path}: {len(pixels)} images and {labels.numel()} labels, expected one label for "
            "each image: fetch it again"
        )
    # MATLAB stores an image column by column.
    return Images(pixels.transpose(2, 3).contiguous(), digits(path, labels.flatten()))


def digits(path: Path, stored: Tensor) -> Tensor:
    labels = stored.double()
    right = (labels >= 1) & (labels <= 10) & (labels == labels.round())
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        raise DataError(
            f"{path}, image {row}: label {labels[row].item():g}, expected 1 to 10, where 10 is "
            "digit 0: fetch it again"
        )
    return labels.long() % 10


def hold_out_svhn(files: SvhnFiles, count: int) -> tuple[Images, Images]:
    """The training and the validation images.

    With the paper's 6,000 for validation: 400 of each class from `train` and 200 from `extra`
    (section 4). With another count: a stratified choice from both together.
    """
    sources = (files.train, files.extra)
    if count == VALIDATION:
        choices = [
            per_class(source.labels, each, "svhn", part)
            for source, each, part in zip(sources, (400, 200), ("train", "extra"), strict=True)
        ]
        held, kept = zip(*choices, strict=True)
        return gather(sources, kept), gather(sources, held)
    check_count("validation", count, len(files.train) + len(files.extra) - 1)
    labels = torch.cat([source.labels for source in sources])
    held, kept = stratified(labels, count, "svhn", "validation")
    border = len(files.train)
    split = [(index[index < border], index[index >= border] - border) for index in (kept, held)]
    return gather(sources, split[0]), gather(sources, split[1])


def gather(sources: tuple[Images, ...], indices: tuple[Tensor, ...]) -> Images:
    chosen = [source[index] for source, index in zip(sources, indices, strict=True)]
    return Images(
        torch.cat([part.images for part in chosen]), torch.cat([part.labels for part in chosen])
    )
