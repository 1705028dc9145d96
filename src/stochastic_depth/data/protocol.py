"""What training needs from a data set, wherever its images live."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stochastic_depth.errors import DataError
from stochastic_depth.randomness import generator

Batch = tuple[Tensor, Tensor]
Part = Literal["validation", "test"]


class Share(NamedTuple):
    """What one of several processes takes of every batch: as much as the others, give or take one.

    rank: which process this is, from 0. ranks: how many there are.
    """

    rank: int = 0
    ranks: int = 1

    def of(self, images: int) -> slice:
        """The images that are its own, of a batch of `images`."""
        return slice(self.rank * images // self.ranks, (self.rank + 1) * images // self.ranks)


ALONE = Share()


class Batches(Protocol):
    """A data set as training sees it, wherever the images live.

    shape: (channels, height, width) of one image as the network sees it. sizes: the number of
    images in `train`, `validation` and `test`. held_out: whether images for validation were held
    out of those for training; if not, they are those of `test`. fingerprint: changes with the data.
    mean, std: float32 [channels], what images are normalised by. shorter_side: how many pixels the
    shorter side of a picture has before the middle is cut out.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def sizes(self) -> dict[str, int]: ...
    @property
    def held_out(self) -> bool: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...
    @property
    def shorter_side(self) -> int: ...

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from step `start` on.

        Images, float32 [batch, channels, height, width], normalised; labels, int64 [batch]: of
        each batch the share that is asked for. A pure function of the seed, the epoch and the
        step, so an epoch can be resumed in its middle.
        """
        ...

    def evaluate(self, part: Part) -> Iterator[Batch]:
        """Every image of a part, or of a share of it, in a fixed order, without augmentation."""
        ...


def steps(images: int, batch: int) -> int:
    """Batches in an epoch; a last batch of one image is left out, BatchNorm cannot train on it.

    Raises:
        DataError: no batch remains, or `batch` is not positive.
    """
    if batch < 1:
        raise DataError(f"batch={batch}: a batch has at least one image")
    count = -(-images // batch)
    if batch > 1 and images % batch == 1:
        count -= 1
    if count < 1:
        raise DataError(f"{images} training images make no batch of {batch}: take more of them")
    return count


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images in an epoch: int64 [images]."""
    return torch.randperm(images, generator=generator("order", seed, epoch))
