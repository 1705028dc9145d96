"""A decoded data set in memory: its parts, fixed subsets of them, and smaller images."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stochastic_depth.errors import DataError
from stochastic_depth.randomness import generator


@dataclass(frozen=True)
class Images:
    """The images and labels of one part of a data set.

    Do not write to the tensors: data sets that are read from the same files share them.

    Raises:
        DataError: when types or shapes differ from these, or there is not one label for each image.
    """

    images: Tensor
    """uint8 [n, channels, height, width]."""
    labels: Tensor
    """int64 [n]."""

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(
                "images must be uint8 [n, channels, height, width], "
                f"not {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 [{len(self.images)}], one for each image, "
                f"not {self.labels.dtype} {list(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> "Images":
        """The images at `indices`: int64 [m], in that order."""
        return Images(self.images[indices], self.labels[indices])

    @staticmethod
    def join(parts: "Iterable[Images]") -> "Images":
        """The images of several parts as one, in their order."""
        images, labels = zip(*((part.images, part.labels) for part in parts), strict=True)
        return Images(torch.cat(images), torch.cat(labels))


@dataclass(frozen=True)
class DataSet:
    """Three parts with the same classes and the same shape of images.

    To use your own data set, write one function that returns a `DataSet`.

    Raises:
        DataError: when there are fewer than two classes, a part is empty, images have different
            shapes, or a label has no class.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images

    def __post_init__(self):
        if len(self.classes) < 2:
            raise DataError(
                f"{self.name} has the classes {list(self.classes)}: a classifier needs two"
            )
        for part, images in self.parts.items():
            if len(images) == 0:
                raise DataError(f"the {part} part of {self.name} is empty: it needs images")
            if images.images.shape[1:] != self.train.images.shape[1:]:
                raise DataError(
                    f"images in the {part} part of {self.name} are "
                    f"{list(images.images.shape[1:])}, in the train part "
                    f"{list(self.train.images.shape[1:])}: they must have one shape"
                )
            low, high = (int(label) for label in images.labels.aminmax())
            if low < 0 or high >= len(self.classes):
                raise DataError(
                    f"labels in the {part} part of {self.name} reach from {low} to {high}: "
                    f"{len(self.classes)} classes have the labels 0 to {len(self.classes) - 1}"
                )

    @property
    def parts(self) -> dict[str, Images]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def mean(self) -> Tensor:
        """Mean of the training part, of pixel values in 0..1: float32 [channels]."""
        return self._moments[0]

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation (population) of the training part: float32 [channels].

        Raises:
            DataError: when a channel has one value everywhere, which cannot be normalised.
        """
        std = self._moments[1]
        if not bool((std > 0).all()):
            raise DataError(
                f"the training images of {self.name} have standard deviations {std.tolist()}: "
                "a channel with one value everywhere cannot be normalised, leave it out"
            )
        return std

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        # Counting the 256 values is exact, so the number of threads cannot change the result.
        channels = self.train.images.unbind(1)
        counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in channels])
        frequencies = counts.double() / counts[0].sum()
        values = torch.arange(256, dtype=torch.float64, device="cpu") / 255
        mean = frequencies @ values
        variance = (frequencies * (values - mean[:, None]) ** 2).sum(1)
        return mean.float(), variance.sqrt().float()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the class names and of every pixel and label: 64 hexadecimal digits."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for part, images in self.parts.items():
            digest.update(repr((part, tuple(images.images.shape))).encode())
            digest.update(images.images.contiguous().numpy().data)
            digest.update(images.labels.contiguous().numpy().data)
        return digest.hexdigest()


def stratified(labels: Tensor, count: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """Choose `count` of the samples, from every class in proportion to its size.

    Args:
        labels: int64 [n].

    Returns:
        The indices of the chosen samples and of the others, each in ascending order. They are a
        pure function of the labels, the count and the key.
    """
    shuffled = torch.randperm(len(labels), generator=generator("split", *key), device="cpu")
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    sizes = torch.bincount(labels)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    # Samples are sorted by their rank within their class over the size of the class, so that the
    # first `count` contain the same fraction of each class.
    rank = torch.arange(len(labels), device="cpu") - starts
    fraction = (rank + 0.5).double() / sizes.repeat_interleave(sizes)
    taken = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    taken[by_class[fraction.argsort(stable=True)[:count]]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


def per_class(labels: Tensor, count: int, *key: int | str) -> tuple[Tensor, Tensor]:
    """`stratified`, but with exactly `count` samples of every class.

    Raises:
        DataError: when a class has fewer samples.
    """
    sizes = torch.bincount(labels)
    if int(sizes.min()) < count:
        label = int(sizes.argmin())
        raise DataError(
            f"class {label} has {int(sizes[label])} images, {count} of each class are to be held "
            "out: give the number of validation images"
        )
    generated = generator("split", *key)
    taken = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in range(len(sizes)):
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generated, device="cpu")
        taken[members[order[:count]]] = True
    return taken.nonzero()[:, 0], (~taken).nonzero()[:, 0]


def check_count(what: str, count: int, most: int) -> None:
    """Raise an error for a number of training images outside 1..most.

    Raises:
        DataError: naming `what`, its value and the values that are allowed.
    """
    if not 1 <= count <= most:
        raise DataError(f"{what}={count}: choose from 1 to {most} training images")


def split(
    name: str, classes: tuple[str, ...], training: Images, test: Images, validation: int
) -> DataSet:
    """A data set of which `validation` training images are held out, in proportion to the classes.

    Raises:
        DataError: when there are not more training images than that.
    """
    check_count("validation", validation, len(training) - 1)
    held, kept = stratified(training.labels, validation, name, "validation")
    return DataSet(name, classes, training[kept], training[held], test)


def subset(name: str, training: Images, count: int) -> Images:
    """`count` of the training images, or all of them if that is their number."""
    check_count("train", count, len(training))
    if count == len(training):
        return training
    chosen, _ = stratified(training.labels, count, name, "train")
    return training[chosen]


def reduced(name: str, part: Images, size: int) -> Images:
    """`part`, with every image reduced to `size` pixels a side by averaging areas.

    A pixel is the mean of the pixels that it covers, in whole numbers, halves rounded up. So it is
    the same on every machine.

    Raises:
        DataError: when images are not square, or their side is not a multiple of `size`.
    """
    count, channels, height, width = part.images.shape
    if size < 1 or height != width or height % size:
        raise DataError(
            f"size={size}: the images of {name} have {height}x{width} pixels, choose a divisor of "
            "their side"
        )
    area = (height // size) ** 2
    blocks = part.images.view(count, channels, size, height // size, size, width // size)
    means = (blocks.sum((3, 5)) + area // 2) // area
    return Images(means.byte(), part.labels)
