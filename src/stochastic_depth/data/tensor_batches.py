"""Batches of a data set that lies in memory."""

from collections.abc import Iterator

import torch

from stochastic_depth.data.augmentation import crop_and_flip, draw_crops, normalise
from stochastic_depth.data.dataset import DataSet
from stochastic_depth.data.protocol import ALONE, Batch, Part, Share, epoch_order, steps


class TensorBatches:
    """`Batches` over a data set that lives on `device` as a whole, as uint8.

    augment: crop and flip the training images, after normalising them with the training part's
    mean and standard deviation; they are padded by an eighth of their height (the paper, section 4:
    4 of 32 pixels). evaluation_batch: images in a batch of `evaluate`. share: what to give of each
    batch.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        batch: int,
        augment: bool,
        seed: int,
        device: torch.device | str,
        channels_last: bool = False,
        evaluation_batch: int = 500,
        share: Share = ALONE,
    ):
        channels, height, width = data.train.images.shape[1:]
        self.name = data.name
        self.classes = data.classes
        self.shape = (channels, height, width)
        self.shorter_side = min(height, width)
        self.fingerprint = data.fingerprint
        self.sizes = {part: len(images) for part, images in data.parts.items()}
        self.held_out = True
        self.steps_per_epoch = steps(len(data.train), batch)
        self.batch = batch
        self.augment = augment
        self.padding = max(1, height // 8)
        self.seed = seed
        self.evaluation_batch = evaluation_batch
        self.share = share
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
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
            mine, count = self.share.of(len(chosen)), len(chosen)
            chosen = chosen[mine]
            batch = normalise(images[chosen], self.mean, self.std)
            if self.augment:
                crops = draw_crops(count, self.padding, "augment", self.seed, epoch, step)
                rows, columns, flips = (draw[mine].to(self.device) for draw in crops)
                batch = crop_and_flip(batch, rows, columns, flips, self.padding)
            yield batch.contiguous(memory_format=self.memory_format), labels[chosen]

    def evaluate(self, part: Part) -> Iterator[Batch]:
        images, labels = self._parts[part]
        for start in range(0, len(images), self.evaluation_batch):
            mine = self.share.of(min(self.evaluation_batch, len(images) - start))
            chosen = slice(start + mine.start, start + mine.stop)
            if mine.start < mine.stop:
                batch = normalise(images[chosen], self.mean, self.std)
                yield batch.contiguous(memory_format=self.memory_format), labels[chosen]
