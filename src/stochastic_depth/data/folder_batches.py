"""Batches of folders of pictures that do not fit into memory, such as ImageNet."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from stochastic_depth.choices import Scaling
from stochastic_depth.data.batching import WHOLE, Batch, Part, Shard, epoch_order, normalise, steps
from stochastic_depth.data.dataset import check_count, stratified
from stochastic_depth.data.picture_files import Samples, fingerprint, scan
from stochastic_depth.data.pictures import (
    FolderImages,
    collate,
    evaluation_view,
    shorter_side,
    training_view,
)
from stochastic_depth.errors import DataError, OutOfMemoryError, first_line
from stochastic_depth.processes import cores, forked_processes
from stochastic_depth.randomness import generator

# The mean and deviation of ImageNet's training images, as every published network uses them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

EVALUATION_BATCH = 250
"""Pictures in a batch of evaluation."""


class FolderBatches:
    """`Batches` of `root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`.

    The test part is the `val` folder, because the paper reports ImageNet's validation error.

    Args:
        workers: how many processes decode pictures, at most one for each core. Their number does
            not change the batches.
        image_size: pixels of a side.
        validation: how many training images to hold out, in proportion to the classes; with 0 the
            `val` folder is also the validation part.
        train: how many of the remaining training images to keep; all when not given.
        augment: whether training uses random crops and flips; otherwise it uses the view of
            evaluation.
        shard: the part of each batch that this process decodes and gets.

    Raises:
        DataError: when folders, classes or pictures are missing, or a count does not fit.
        MissingExtraError: when torchvision is not installed.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        batch: int,
        seed: int,
        device: torch.device | str,
        workers: int,
        image_size: int = 224,
        validation: int = 0,
        train: int | None = None,
        augment: bool = True,
        name: str = "imagenet",
        shard: Shard = WHOLE,
    ):
        if image_size < 1:
            raise DataError(f"size={image_size}: give at least one pixel a side")
        if workers < 0:
            raise DataError(f"workers={workers}: give 0, or a number of processes")
        self.root = Path(root).expanduser()
        self.classes, training = scan(self.root / "train")
        classes, test = scan(self.root / "val")
        if classes != self.classes:
            missing = sorted(set(self.classes) ^ set(classes))[:5]
            raise DataError(
                f"{self.root}: train has {len(self.classes)} classes and val {len(classes)}, "
                f"expected the same; only in one of them: {', '.join(missing)}"
            )
        self._samples = {"train": training, "validation": test, "test": test}
        if validation:
            check_count("validation", validation, len(training) - 1)
            held, training = choose(training, validation, name, "validation")
            self._samples |= {"train": training, "validation": held}
        if train is not None:
            check_count("train", train, len(training))
            self._samples["train"], _ = choose(training, train, name, "train")
        self.name = name
        self.shape = (3, image_size, image_size)
        self.shorter_side = shorter_side(image_size)
        self.scaling: Scaling = "bilinear"  # as torchvision does
        self.sizes = {part: len(samples) for part, samples in self._samples.items()}
        self.held_out = validation > 0
        self.steps_per_epoch = steps(self.sizes["train"], batch)
        self.batch = batch
        self.augment = augment
        self.seed = seed
        self.workers = workers
        self.shard = shard
        self.device = torch.device(device)
        self.mean, self.std = (torch.tensor(v, device=self.device) for v in (MEAN, STD))
        self._evaluation_view = evaluation_view(image_size)
        self._training_view = training_view(image_size) if augment else self._evaluation_view

    @property
    def fingerprint(self) -> str:
        """sha256 of the names and contents of all pictures, as `picture_files.fingerprint` says."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.root, self.classes, self._samples)

    def train(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = epoch_order(self.sizes["train"], self.seed, epoch).split(self.batch)
        key = ("augment", self.seed, epoch)
        images = FolderImages(self._samples["train"], self._training_view, key)
        yield from self._load(images, order[start : self.steps_per_epoch])

    def evaluate(self, part: Part) -> Iterator[Batch]:
        images = FolderImages(self._samples[part], self._evaluation_view, ("evaluate",))
        in_order = torch.arange(len(images), device="cpu").split(EVALUATION_BATCH)
        yield from self._load(images, in_order)

    def _load(self, images: FolderImages, batches: tuple[torch.Tensor, ...]) -> Iterator[Batch]:
        shards = (batch[self.shard.slice_of(len(batch))].tolist() for batch in batches)
        shards = [indices for indices in shards if indices]
        workers = min(self.workers, cores(), len(shards))  # PyTorch warns if they exceed the cores
        loader = DataLoader(
            images,
            batch_sampler=shards,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=forked_processes() if workers else None,
            pin_memory=self.device.type == "cuda",
            # Without this the loader would draw from the global random state.
            generator=generator("workers", self.seed),
        )
        failure: DataError | OutOfMemoryError
        try:
            for loaded in _on_cpu(loader):
                if isinstance(loaded, DataError):
                    failure = loaded
                    break
                pictures, labels = (tensor.to(self.device, non_blocking=True) for tensor in loaded)
                batch = normalise(pictures, self.mean, self.std)
                yield batch.contiguous(memory_format=torch.channels_last), labels
            else:
                return
        except (ConnectionError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_worker_death(error):
                raise
            failure = worker_death(error)
        # Raised here, when the last reference to the loader is gone and its workers have stopped.
        raise failure


def is_worker_death(error: BaseException) -> bool:
    """Whether PyTorch says that a process that decodes pictures has died.

    It says so in the loader, or by a signal handler in whatever runs at that moment.
    """
    return str(error).startswith("DataLoader worker (pid")


def worker_death(error: BaseException) -> OutOfMemoryError:
    """The error in place of one that follows the death of a process that decodes pictures."""
    return OutOfMemoryError(
        f"a process that decodes pictures has died ({first_line(error)[:200]}), maybe for lack of "
        "memory: resume, or begin a run with fewer --data.workers"
    )


def _on_cpu(loader: DataLoader) -> Iterator[Any]:
    """Iterate over `loader` with the CPU as PyTorch's default device, where its generator is."""
    with torch.device("cpu"):
        iterator = iter(loader)
    while True:
        with torch.device("cpu"):
            loaded = next(iterator, None)
        if loaded is None:
            return
        yield loaded


def choose(samples: Samples, count: int, *key: str) -> tuple[Samples, Samples]:
    """`count` samples, in proportion to the classes; and all others."""
    labels = torch.tensor([label for _, label in samples], device="cpu")
    taken, rest = (index.tolist() for index in stratified(labels, count, *key))
    return [samples[i] for i in taken], [samples[i] for i in rest]
