"""Street View House Numbers, cropped digits (Netzer et al., 2011), as MATLAB files."""

from pathlib import Path
from typing import Any

import torch

from stochastic_depth.data.dataset import DataSet, Images, per_class, split
from stochastic_depth.data.published_files import contents, open_published
from stochastic_depth.errors import DataError
from stochastic_depth.extras import require

VALIDATION = 6_000
"""How many training images the paper holds out."""
INSTEAD = "the digits as pictures in train/<class>/ and val/<class>/, with --data.name folder"
FILES = ("train_32x32.mat", "extra_32x32.mat", "test_32x32.mat")
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
"""Checksums of the published files, the same as in torchvision."""
CLASSES = tuple("0123456789")


def has_svhn(root: Path) -> bool:
    return all((root / name).is_file() for name in FILES)


def fetch_svhn(datasets: Any, root: Path) -> None:
    """Download the three files into `root`.

    Args:
        datasets: `torchvision.datasets`.
    """
    for url, name, md5 in datasets.SVHN.split_list.values():
        datasets.utils.download_url(url, str(root), name, md5)


def split_svhn(root: Path, validation: int) -> DataSet:
    """SVHN, of which `validation` training images are held out; it trains on train and extra.

    With 6,000 validation images, as in the paper, 400 of each class come from train and 200 from
    extra (section 4). With another number they are a stratified choice from both together.

    Raises:
        DataError: as `read_svhn`, and when there are too few images.
    """
    train, extra, test = read_svhn(root)
    if validation != VALIDATION:
        return split("svhn", CLASSES, Images.join((train, extra)), test, validation)
    kept, held = [], []
    for part, source, each in (("train", train, 400), ("extra", extra, 200)):
        taken, rest = per_class(source.labels, each, "svhn", part)
        kept.append(source[rest])
        held.append(source[taken])
    return DataSet("svhn", CLASSES, Images.join(kept), Images.join(held), test)


def read_svhn(root: Path) -> list[Images]:
    """The images of train_32x32.mat, extra_32x32.mat and test_32x32.mat.

    Raises:
        DataError: when a file is missing, or is not as it was published; names it.
    """
    for name in FILES:
        if not (root / name).is_file():
            raise DataError(
                f"{root / name}: missing; the training set is train and extra together, and all "
                f"of {', '.join(FILES)} are needed (ufldl.stanford.edu/housenumbers, format 2). "
                f"Found {contents(root)}"
            )
    return [read_mat(root / name) for name in FILES]


def read_mat(path: Path) -> Images:
    """One published file: X, uint8 [32, 32, 3, n], and y, [n, 1], in which 10 is the digit 0.

    Raises:
        DataError: when it cannot be read, or is not as it was published.
        MissingExtraError: when scipy is not installed.
    """
    scipy = require("scipy.io", "train")
    with open_published(path, MD5, INSTEAD) as file:
        arrays = scipy.loadmat(file, variable_names=("X", "y"))
    pixels = torch.from_numpy(arrays["X"]).permute(3, 2, 0, 1).contiguous()
    return Images(pixels, torch.from_numpy(arrays["y"].astype("int64")).flatten() % 10)
