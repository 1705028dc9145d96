"""Street View House Numbers, cropped digits (Netzer et al., 2011), as MATLAB files."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stochastic_depth.data.dataset import Images
from stochastic_depth.data.folders import contents
from stochastic_depth.data.split import check_count, per_class, stratified
from stochastic_depth.errors import DataError
from stochastic_depth.extras import require

VALIDATION = 6_000
FILES = ("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat")
LABEL_KINDS = ("uint8", "double")


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
        MissingExtraError: SciPy is not installed.
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
    mat = require("scipy.io", "data")
    try:
        headers = {name: (shape, kind) for name, shape, kind in mat.whosmat(path)}
        shape, kind = headers.get("X", ((), "nothing"))
        if shape[:3] != (32, 32, 3) or len(shape) != 4 or kind != "uint8":
            raise DataError(f"{path}: X is {kind} {list(shape)}, expected uint8 [32, 32, 3, n]")
        label_shape, label_kind = headers.get("y", ((), "nothing"))
        if label_shape not in ((shape[3], 1), (1, shape[3])) or label_kind not in LABEL_KINDS:
            raise DataError(
                f"{path}: y is {label_kind} {list(label_shape)}, expected "
                f"{' or '.join(LABEL_KINDS)} [{shape[3]}, 1], one label for each image"
            )
        content = mat.loadmat(path, variable_names=["X", "y"])
        pixels = torch.from_numpy(content["X"]).permute(3, 2, 0, 1).contiguous()
        labels = digits(path, torch.from_numpy(content["y"]).flatten())
        return Images(pixels, labels)
    except DataError:
        raise
    except Exception as error:
        # SciPy's reader raises a dozen types on damaged files.
        raise DataError(
            f"{path}: no readable MATLAB 5 file ({type(error).__name__}: {error}): fetch it again"
        ) from error


def digits(path: Path, labels: Tensor) -> Tensor:
    right = (labels >= 1) & (labels <= 10) & (labels == labels.long())
    if not bool(right.all()):
        row = int((~right).nonzero()[0])
        raise DataError(
            f"{path}, image {row}: label {labels[row].item()}, expected 1 to 10, where 10 is "
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
