"""Small data sets in the layouts in which the real ones are published."""

import hashlib
import io
import pickle
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io
import torch
from PIL import Image

from stochastic_depth.data import cifar, svhn
from stochastic_depth.data.cifar import CIFAR10, CIFAR100

SVHN_SIZES = {"train": 60, "extra": 90, "test": 30}
IMAGENET_CLASSES = ("n01", "n02", "n03")


PUBLISHED = cifar.MD5 | svhn.MD5
"""Before a test has put the checksum of a small file in the place of the real one."""


def published(name, content):
    """`content`, its checksum taken for that of the published file `name`."""
    checksums = svhn.MD5 if name in svhn.MD5 else cifar.MD5
    checksums[name] = hashlib.md5(content).hexdigest()
    return content


def encode(pixels, kind="PNG", **options):
    """The bytes of one uint8 picture [height, width, 3], lossless by default."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def png_of(side, more=b""):
    """A PNG that claims `side` x `side` pixels."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + more + body


def split(names, pixels, labels):
    """One equal part for each file."""
    pixels, labels = np.array_split(pixels, len(names)), np.array_split(labels, len(names))
    return zip(names, pixels, labels, strict=True)


def write_pickles(folder, variant, train, train_labels, test, test_labels):
    folder.mkdir(parents=True)
    key = b"labels" if variant is CIFAR10 else b"fine_labels"
    for names, pixels, labels in zip(
        variant.pickle_files, (train, test), (train_labels, test_labels), strict=True
    ):
        for name, part, part_labels in split(names, pixels, labels):
            rows = np.ascontiguousarray(part.transpose(0, 3, 1, 2)).reshape(len(part), 3072)
            batch = {b"data": rows, key: part_labels.tolist(), b"filenames": [b"x"] * len(part)}
            (folder / name).write_bytes(published(name, pickle.dumps(batch, 2)))


def write_binary(folder, variant, train, train_labels, test, test_labels):
    folder.mkdir(parents=True)
    for names, pixels, labels in zip(
        variant.binary_files, (train, test), (train_labels, test_labels), strict=True
    ):
        for name, part, part_labels in split(names, pixels, labels):
            coarse = [7] if variant is CIFAR100 else []
            (folder / name).write_bytes(
                b"".join(
                    bytes([*coarse, label]) + image.transpose(2, 0, 1).tobytes()
                    for image, label in zip(part, part_labels, strict=True)
                )
            )


def table(encoded, labels, image="img", label="label", bare=False):
    column = encoded if bare else [{"bytes": item, "path": None} for item in encoded]
    kind = pa.binary() if bare else pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({image: pa.array(column, kind), label: pa.array(labels)})


def write_parquet(folder, variant, train, train_labels, test, test_labels, **options):
    folder.mkdir(parents=True, exist_ok=True)
    options = {"label": variant.label_columns[0]} | options
    halves = np.array_split(np.arange(len(train)), 2)
    for i, rows in enumerate(halves):
        encoded = [encode(image, "WEBP", lossless=True) for image in train[rows]]
        path = folder / f"train-0000{i}-of-00002.parquet"
        pq.write_table(table(encoded, train_labels[rows], **options), path, row_group_size=7)
    encoded = [encode(image) for image in test]
    pq.write_table(table(encoded, test_labels, **options), folder / "test-00000-of-00001.parquet")


def write_folders(folder, variant, train, train_labels, test, test_labels):
    for part, pixels, labels in (("train", train, train_labels), ("test", test, test_labels)):
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = folder / part / variant.classes[label] / f"{i:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image))


def write_cifar(layout, root, variant, *parts):
    """In the folders that the published layout has; gives one of the files with training images."""
    match layout:
        case "pickles":
            write_pickles(root / variant.pickle_folder, variant, *parts)
            return root / variant.pickle_folder / variant.pickle_files[0][-1]
        case "binary":
            write_binary(root / variant.binary_folder, variant, *parts)
            return root / variant.binary_folder / variant.binary_files[0][-1]
        case "parquet":
            write_parquet(root, variant, *parts)
            return root / "train-00001-of-00002.parquet"
        case "folders":
            write_folders(root, variant, *parts)
            return next((root / "train").rglob("*.png"))


def write_svhn(root, sizes=SVHN_SIZES, **options):
    """The three files; returns their pixels [n, 32, 32, 3] and labels 0 to 9."""
    made = {}
    for seed, (part, n) in enumerate(sizes.items()):
        pixels = np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        digits = np.arange(n) % 10
        stored = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        content = {"X": pixels.transpose(1, 2, 3, 0), "y": stored}
        file = io.BytesIO()
        scipy.io.savemat(file, content, **options)
        name = f"{part}_32x32.mat"
        (root / name).write_bytes(published(name, file.getvalue()))
        made[part] = pixels, digits
    return made


def smooth(seed, width, height):
    """A picture that JPEG and scaling change little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def write_imagenet(root, train=7, val=3):
    for part, each in (("train", train), ("val", val)):
        for label, name in enumerate(IMAGENET_CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(each):
                picture = smooth(100 * label + 10 * i + len(part), 40 + 5 * i, 60 - 4 * i)
                picture.save(folder / f"{name}_{i}.JPEG", "JPEG")


def same_batches(one, other):
    """Whether two sequences of (images, labels) are equal, bit for bit."""
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def write_pictures(root, seed=0, train=6, val=2):
    """One folder per class, as people have their own pictures; another `seed` draws others."""
    generator = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for name in ("cats", "dogs"):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                (folder / f"{number}.png").write_bytes(encode(pixels))
