"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) in each of their public layouts."""

import functools
import pickle
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.data.dataset import Images
from stochastic_depth.data.parquet import read_shard, shards
from stochastic_depth.data.picture_files import SUFFIXES, picture_names
from stochastic_depth.data.pictures import decode
from stochastic_depth.data.published_files import (
    all_files,
    any_file,
    archives,
    contents,
    open_published,
    read_data_file,
    unpacking,
)
from stochastic_depth.errors import DataError

SIDE = 32
"""The width and height of the images, in pixels."""
PARTS = ("train", "test")
PUBLISHED = (50_000, 10_000)
"""The number of images in each part."""
INSTEAD = "the binary version, the parquet files, or train/ and test/ with a folder for each class"

MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
"""Checksums of the published pickle files of CIFAR-10 and CIFAR-100, the same as in torchvision."""

# The official order: a name's position is its label.
NAMES_10 = "airplane automobile bird cat deer dog frog horse ship truck"
NAMES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house
kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew
skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf
woman worm
"""


@dataclass(frozen=True)
class Variant:
    """The names in the published files. Label columns are tried in the order of `label_columns`."""

    name: str
    classes: tuple[str, ...]
    pickle_folder: str
    pickle_files: tuple[tuple[str, ...], tuple[str, ...]]
    pickle_labels: bytes
    binary_folder: str
    binary_files: tuple[tuple[str, ...], tuple[str, ...]]
    binary_label_bytes: int
    label_columns: tuple[str, ...]

    def images(self, pixels: Tensor, labels: Tensor, source: Path) -> Images:
        """Images of this variant, after checking the labels.

        Args:
            pixels: uint8 [n, 3, 32, 32].
            labels: integers [n].
            source: the file that the images come from.

        Raises:
            DataError: when there are no images, not one label for each, or a label out of range.
        """
        if len(pixels) == 0:
            raise DataError(f"{source}: holds no images: fetch it again")
        if labels.shape != pixels.shape[:1]:
            raise DataError(
                f"{source}: {len(pixels)} images and labels of shape {list(labels.shape)}, "
                "expected one label for each image: fetch it again"
            )
        labels = labels.long()
        wrong = ((labels < 0) | (labels >= len(self.classes))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{source}, row {row}: label {int(labels[row])}, expected 0 to "
                f"{len(self.classes) - 1}: these are not the labels of {self.name}"
            )
        return Images(pixels, labels)


CIFAR10 = Variant(
    name="cifar10",
    classes=tuple(NAMES_10.split()),
    pickle_folder="cifar-10-batches-py",
    pickle_files=(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",)),
    pickle_labels=b"labels",
    binary_folder="cifar-10-batches-bin",
    binary_files=(tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",)),
    binary_label_bytes=1,
    label_columns=("label", "labels"),
)

CIFAR100 = Variant(
    name="cifar100",
    classes=tuple(NAMES_100.split()),
    pickle_folder="cifar-100-python",
    pickle_files=(("train",), ("test",)),
    pickle_labels=b"fine_labels",
    binary_folder="cifar-100-binary",
    binary_files=(("train.bin",), ("test.bin",)),
    # The first of the two label bytes is the coarse label.
    binary_label_bytes=2,
    label_columns=("fine_label", "fine_labels"),
)


def find_cifar(root: Path, variant: Variant) -> tuple["Layout", Path] | None:
    """The first layout that is found in `root`, or in a folder to which its archives unpack."""
    unpacked = (variant.pickle_folder, variant.binary_folder, "data", "plain_text", variant.name)
    for layout in LAYOUTS:
        for folder in (root, *(root / name for name in unpacked)):
            if layout.present(folder, variant):
                return layout, folder
    return None


def read_cifar(root: Path, variant: Variant) -> tuple[Images, Images]:
    """The training part and the test part.

    Raises:
        DataError: when no layout is found, or the layout is damaged or incomplete.
        MissingExtraError: when a library that this layout needs is not installed.
    """
    found = find_cifar(root, variant)
    if found:
        layout, folder = found
        return layout.read(folder, variant)
    if packed := archives(root):
        raise DataError(
            f"{root}: holds {packed[0].name}, which is not unpacked: {unpacking(packed[0])}"
        )
    raise DataError(
        f"{root}: no {variant.name} found. Expected {variant.pickle_folder}/, "
        f"{variant.binary_folder}/, train-*.parquet with test-*.parquet, or "
        f"train/<class>/*.png with test/<class>/*.png; found {contents(root)}"
    )


def fetch_cifar(datasets: Any, variant: Variant, root: Path) -> None:
    """Download the archive into `root` and unpack it there.

    Args:
        datasets: `torchvision.datasets`.
    """
    published = getattr(datasets, variant.name.upper())
    datasets.utils.download_url(published.url, str(root), published.filename, published.tgz_md5)
    with tarfile.open(root / published.filename) as archive:
        archive.extractall(root, filter="data")


def read_pickles(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part of the "python version": pickled dictionaries of numpy arrays.

    Raises:
        DataError: when a file is missing, or is not as it was published; names it.
    """
    parts = all_files(folder, variant.pickle_files)
    train, test = (Images.join(read_batch(path, variant) for path in part) for part in parts)
    return train, test


def read_batch(path: Path, variant: Variant) -> Images:
    """One pickle file: data, uint8 [n, 3072], channel by channel, and n labels.

    Raises:
        DataError: when the file is not the published one, in which case it is not unpickled.
    """
    with open_published(path, MD5, INSTEAD) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy 2 warns about files that numpy 1 has written
        batch = pickle.load(file, encoding="bytes")
    pixels = torch.from_numpy(batch[b"data"]).view(-1, 3, SIDE, SIDE)
    return variant.images(pixels, torch.tensor(batch[variant.pickle_labels], device="cpu"), path)


def read_binary(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part of the "binary version".

    Raises:
        DataError: when a file is missing, is not a whole number of records or lacks some; names it.
    """
    parts = all_files(folder, variant.binary_files)
    train, test = (
        Images.join(
            complete(read_records(path, variant), published // len(part), path) for path in part
        )
        for part, published in zip(parts, PUBLISHED, strict=True)
    )
    return train, test


def complete(images: Images, published: int, source: object) -> Images:
    """`images`, if there are as many as were published, or so few that this is on purpose.

    Raises:
        DataError: when some of them seem to be lost; names `source`, and both numbers.
    """
    if len(images) != published and len(images) > published // 10:
        raise DataError(
            f"{source}: {len(images):,} images, published with {published:,}: fetch it again; to "
            "train on fewer images, give --data.train N (train=N, in Python)"
        )
    return images


def read_records(path: Path, variant: Variant) -> Images:
    """One file of records: label bytes, the last of which is the (fine) label, and 3,072 pixels."""
    record = variant.binary_label_bytes + 3 * SIDE * SIDE
    content = read_data_file(path)
    if len(content) == 0 or len(content) % record:
        raise DataError(
            f"{path}: {len(content)} bytes, expected records of {record} bytes for "
            f"{variant.name}: fetch it again"
        )
    records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    pixels = records[:, variant.binary_label_bytes :].reshape(-1, 3, SIDE, SIDE)
    return variant.images(pixels, records[:, variant.binary_label_bytes - 1], path)


def read_folders(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part, from `train/<class>/` and `test/<class>/`.

    Raises:
        DataError: when a folder or a picture is not as expected; names it.
        MissingExtraError: when Pillow is not installed.
    """
    train, test = (
        complete(read_part(folder / part, variant), published, folder / part)
        for part, published in zip(PARTS, PUBLISHED, strict=True)
    )
    return train, test


def read_part(root: Path, variant: Variant) -> Images:
    """One part of pictures in folders: classes in their official order, their pictures by name."""
    found = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    visible = {name for name in found if not name.startswith(".")}
    if visible != set(variant.classes):
        raise DataError(
            f"{root}: expected one folder for each class of {variant.name}; "
            f"missing {first_few(set(variant.classes) - visible)}, "
            f"unexpected {first_few(visible - set(variant.classes))}"
        )
    paths, labels = [], []
    for label, name in enumerate(variant.classes):
        below = root / name
        pictures = [below / n for n in picture_names(below, (p.name for p in below.iterdir()))]
        if not pictures:
            raise DataError(f"{root / name}: holds no pictures ({', '.join(SUFFIXES)})")
        paths += pictures
        labels += [label] * len(pictures)
    pixels = decode(len(paths), lambda i: read_data_file(paths[i]), lambda i: str(paths[i]), SIDE)
    return variant.images(pixels, torch.tensor(labels, device="cpu"), root)


def first_few(names: set[str]) -> str:
    """The first five of `names`, as a list for an error message."""
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "") or "none"


def read_parquet(folder: Path, variant: Variant) -> tuple[Images, Images]:
    """Training and test part, from `train-*.parquet` and `test-*.parquet`.

    Raises:
        DataError: when a file or a row is missing or not as expected; names it.
        MissingExtraError: when pyarrow or Pillow is not installed.
    """
    files = tuple(
        tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in shards(folder, part))
        for part in PARTS
    )
    return _decoded(files, variant)


@functools.lru_cache(maxsize=1)
def _decoded(
    files: tuple[tuple[tuple[Path, int, int], ...], ...], variant: Variant
) -> tuple[Images, Images]:
    """Both parts, cached: decoding takes seconds, and the runs of a sweep read the same files.

    Args:
        files: path, size and modification time of the files of each part.
    """
    train, test = (
        complete(
            Images.join(read_parquet_file(path, variant) for path, *_ in part),
            published,
            ", ".join(str(path) for path, *_ in part),
        )
        for part, published in zip(files, PUBLISHED, strict=True)
    )
    return train, test


def read_parquet_file(path: Path, variant: Variant) -> Images:
    """The images of one parquet file."""
    return variant.images(*read_shard(path, variant.label_columns, SIDE), path)


@dataclass(frozen=True)
class Layout:
    """One form in which CIFAR is published: how to recognise it, and how to read it."""

    present: Callable[[Path, Variant], bool]
    read: Callable[[Path, Variant], tuple[Images, Images]]


LAYOUTS = (
    Layout(lambda folder, variant: any_file(folder, variant.pickle_files), read_pickles),
    Layout(lambda folder, variant: any_file(folder, variant.binary_files), read_binary),
    Layout(
        lambda folder, _: any(any(folder.glob(f"{part}*.parquet")) for part in PARTS), read_parquet
    ),
    Layout(lambda folder, _: any((folder / part).is_dir() for part in PARTS), read_folders),
)
"""All layouts, in the order in which they are tried."""
