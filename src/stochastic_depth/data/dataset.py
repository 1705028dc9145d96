"""A decoded and split data set in memory."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stochastic_depth.errors import DataError


@dataclass(frozen=True)
class Images:
    """One part of a data set.

    images: uint8 [n, channels, height, width]. labels: int64 [n].

    Raises:
        DataError: other types or shapes, or not one label for each image.
    """

    images: Tensor
    labels: Tensor

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


@dataclass(frozen=True)
class DataSet:
    """Three parts with the same classes and the same shape of image.

    Your own data set is one function that returns this.

    Raises:
        DataError: an empty part, images of another shape, a label without a class.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images
    test: Images

    def __post_init__(self):
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
        """Of the training part: float32 [channels], of pixel values in 0..1."""
        return self._moments[0]

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation (of the population) of the training part, as `mean`.

        Raises:
            DataError: a channel that has one value everywhere cannot be normalised.
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
        share = counts.double() / counts[0].sum()
        values = torch.arange(256) / torch.tensor(255, dtype=torch.float64)
        mean = share @ values
        variance = (share * (values - mean[:, None]) ** 2).sum(1)
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
