"""The interface of batches; and batches of a data set in memory, augmented on its device."""

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from stochastic_depth.choices import Scaling
from stochastic_depth.data.dataset import DataSet
from stochastic_depth.errors import DataError
from stochastic_depth.randomness import generator

Batch = tuple[Tensor, Tensor]
Part = Literal["validation", "test"]

EVALUATION_BATCH = 500
"""Images in a batch of evaluation, of a data set in memory."""


class Shard(NamedTuple):
    """The part of every batch that one process takes; these parts differ by one image at most."""

    rank: int = 0
    """The number of this process, from 0."""
    ranks: int = 1
    """How many processes there are."""

    def slice_of(self, images: int) -> slice:
        """The images of a batch of `images` that this process takes."""
        return slice(self.rank * images // self.ranks, (self.rank + 1) * images // self.ranks)


WHOLE = Shard()


class Batches(Protocol):
    """A data set as training uses it, in memory or on disk.

    Attributes:
        name: the name of the data set.
        classes: the name of each class; its position is the label.
        shape: (channels, height, width) of one image as the network sees it.
        fingerprint: a hash of the data.
        sizes: the number of images in `train`, `validation` and `test`.
        held_out: whether validation images were held out of the training images. If not, the test
            images are used for validation.
        batch: the number of images in a batch of training, of all processes together.
        steps_per_epoch: the number of batches in an epoch.
        seed: chooses their order and their augmentation.
        augment: whether training images are randomly cropped and flipped.
        shard: the part of each batch that this process gets.
        mean, std: float32 [channels], by which images are normalised.
        shorter_side: the length in pixels to which the shorter side of a picture is scaled before
            its middle is cut out.
        scaling: how it is scaled.
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
    def batch(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def augment(self) -> bool: ...
    @property
    def shard(self) -> Shard: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...
    @property
    def shorter_side(self) -> int: ...
    @property
    def scaling(self) -> Scaling: ...

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from step `start` on; of each batch the shard of this process.

        Each is a pair of images, float32 [batch, channels, height, width], channels_last and
        normalised, and labels, int64 [batch]. A batch is a pure function of the seed, the epoch and
        the step, so an epoch can be resumed in the middle.
        """
        ...

    def evaluate(self, part: Part) -> Iterator[Batch]:
        """All images of a part, in a fixed order, not augmented; of each batch this shard."""
        ...


def steps(images: int, batch: int) -> int:
    """Batches in an epoch. A last batch of one image is left out, as BatchNorm needs two.

    Raises:
        DataError: when no batch remains, or `batch` is not positive.
    """
    if batch < 1:
        raise DataError(f"batch={batch}: a batch has at least one image")
    count = -(-images // batch)
    if batch > 1 and images % batch == 1:
        count -= 1
    if count < 1:
        raise DataError(
            f"{images} training images are too few for a batch of {batch}: take more of them"
        )
    return count


def epoch_order(images: int, seed: int, epoch: int) -> Tensor:
    """The order of the training images in an epoch: int64 [images]."""
    return torch.randperm(images, generator=generator("order", seed, epoch), device="cpu")


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images / 255 - mean) / std, channel by channel.

    Args:
        images: uint8 [batch, channels, height, width].
        mean, std: float32 [channels], of pixel values in 0..1.

    Returns:
        float32, of the images' shape and memory format.
    """
    return (images / 255).sub_(mean[:, None, None]).div_(std[:, None, None])


def draw_crops(batch: int, padding: int, *key: int | str) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the positions for `crop_and_flip`, as a pure function of `key`.

    Returns:
        Rows and columns, int64 [batch], uniform in 0..2 * padding; and flips, bool [batch], true
        with probability 1/2. They are drawn on the CPU, so that they are the same for every device.
    """
    source = generator(*key)
    rows, columns = torch.randint(2 * padding + 1, (2, batch), generator=source, device="cpu")
    flips = torch.randint(2, (batch,), generator=source, device="cpu").bool()
    return rows, columns, flips


def crop_and_flip(
    images: Tensor, rows: Tensor, columns: Tensor, flips: Tensor, padding: int
) -> Tensor:
    """Pad each image with `padding` zeros, cut a window of the original size, mirror some windows.

    This is the standard augmentation of CIFAR (the paper, section 4). The authors' code pads after
    normalising, so the border has the mean colour and is not black.

    Args:
        images: [batch, channels, height, width]; all arguments are on one device.
        rows, columns: [batch], the upper left corner of the window in the padded image.
        flips: bool [batch], which windows are mirrored left and right.

    Returns:
        A tensor of the images' shape.
    """
    batch, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    down = torch.arange(height, device=images.device)
    across = torch.arange(width, device=images.device).expand(batch, width)
    across = torch.where(flips[:, None], width - 1 - across, across)
    down, across = rows[:, None] + down, columns[:, None] + across
    window = (down[:, :, None] * padded.shape[3] + across[:, None, :]).view(batch, 1, -1)
    pixels = padded.flatten(2).gather(2, window.expand(batch, channels, height * width))
    return pixels.view(images.shape)


class TensorBatches:
    """`Batches` of a data set that is held in the memory of `device`, as uint8.

    Args:
        augment: whether to crop and flip the training images, after normalising them with the mean
            and standard deviation of the training part. They are padded by an eighth of their
            height (the paper, section 4: 4 of 32 pixels).
        shard: the part of each batch that this process gets.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        batch: int,
        augment: bool,
        seed: int,
        device: torch.device | str,
        shard: Shard = WHOLE,
    ):
        channels, height, width = data.train.images.shape[1:]
        self.name = data.name
        self.classes = data.classes
        self.shape = (channels, height, width)
        self.shorter_side = min(height, width)
        self.scaling: Scaling = "area"  # as `reduced` does
        self.fingerprint = data.fingerprint
        self.sizes = {part: len(images) for part, images in data.parts.items()}
        self.held_out = True
        self.steps_per_epoch = steps(len(data.train), batch)
        self.batch = batch
        self.augment = augment
        self.padding = max(1, height // 8)
        self.seed = seed
        self.shard = shard
        self.device = torch.device(device)
        self.mean, self.std = data.mean.to(self.device), data.std.to(self.device)
        self._parts = {
            part: (images.images.to(self.device), images.labels.to(self.device))
            for part, images in data.parts.items()
        }

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        images, labels = self._parts["train"]
        order = epoch_order(len(images), self.seed, epoch).to(self.device)
        for step in range(start, self.steps_per_epoch):
            chosen = order[step * self.batch : (step + 1) * self.batch]
            mine, count = self.shard.slice_of(len(chosen)), len(chosen)
            chosen = chosen[mine]
            batch = normalise(images[chosen], self.mean, self.std)
            if self.augment:
                crops = draw_crops(count, self.padding, "augment", self.seed, epoch, step)
                rows, columns, flips = (draw[mine].to(self.device) for draw in crops)
                batch = crop_and_flip(batch, rows, columns, flips, self.padding)
            yield batch.contiguous(memory_format=torch.channels_last), labels[chosen]

    def evaluate(self, part: Part) -> Iterator[Batch]:
        images, labels = self._parts[part]
        for start in range(0, len(images), EVALUATION_BATCH):
            mine = self.shard.slice_of(min(EVALUATION_BATCH, len(images) - start))
            chosen = slice(start + mine.start, start + mine.stop)
            if mine.start < mine.stop:
                batch = normalise(images[chosen], self.mean, self.std)
                yield batch.contiguous(memory_format=torch.channels_last), labels[chosen]
