"""CIFAR as one folder of pictures per class."""

from pathlib import Path

import torch

from stochastic_depth.data.cifar.variants import SIZE, Variant
from stochastic_depth.data.dataset import Images
from stochastic_depth.data.folders import read_file
from stochastic_depth.data.pictures import SUFFIXES, decode
from stochastic_depth.errors import DataError


def present(folder: Path, variant: Variant) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def read(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part, from `train/<class>/` and `test/<class>/`.

    Raises:
        DataError: names the folder or the picture that is not as expected.
        MissingExtraError: Pillow is not installed.
    """
    return read_part(folder / "train", variant), read_part(folder / "test", variant)


def read_part(root: Path, variant: Variant) -> Images:
    """The classes in their official order, the pictures of a class by name."""
    found = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    visible = {name for name in found if not name.startswith(".")}
    if visible != set(variant.classes):
        raise DataError(
            f"{root}: expected one folder for each class of {variant.name}; "
            f"missing {some(set(variant.classes) - visible)}, "
            f"unexpected {some(visible - set(variant.classes))}"
        )
    paths, labels = [], []
    for label, name in enumerate(variant.classes):
        pictures = sorted(
            path
            for path in (root / name).iterdir()
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
        )
        if not pictures:
            raise DataError(f"{root / name}: holds no pictures ({', '.join(SUFFIXES)})")
        paths += pictures
        labels += [label] * len(pictures)
    pixels = decode(len(paths), lambda i: read_file(paths[i]), lambda i: str(paths[i]), size=SIZE)
    return variant.images(pixels, torch.tensor(labels), root)


def some(names: set[str], most: int = 5) -> str:
    return ", ".join(sorted(names)[:most]) + (", ..." if len(names) > most else "") or "none"
