"""The share of a training step that goes into its data: order, gathering, crop and flip."""

import itertools
from collections.abc import Callable, Iterator

import torch

from stochastic_depth.data import Batches, DataSet, Images, TensorBatches, batches
from stochastic_depth.data.protocol import Batch, epoch_order
from stochastic_depth.randomness import generator
from stochastic_depth.timing import Timing
from stochastic_depth.train.config import Config
from stochastic_depth.train.execution import Execution
from stochastic_depth.train.training import Training

ORDER = "order of an epoch"
DATA = "data and augmentation"
IMAGES = 45_000
"""Generated ones: as many as CIFAR-10 has without its validation images."""


def generated(images: int) -> DataSet:
    """Random pictures of CIFAR's shape, with ten classes in turns."""

    def part(name: str, count: int) -> Images:
        pixels = torch.randint(
            256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator("bench", name)
        )
        return Images(pixels, torch.arange(count) % 10)

    classes = tuple(map(str, range(10)))
    few = part("held out", 10)
    return DataSet("generated", classes, part("train", images), few, few)


def augmented(config: Config, execution: Execution) -> Batches:
    """The batches that `config` trains on, cropped and flipped; generated if it names no folder."""
    if config.data.root is not None:
        return batches(
            config.data.name,
            config.data.root,
            batch=config.optimizer.batch,
            seed=config.seed,
            device=execution.device,
            augment=True,
            channels_last=True,
        )
    return TensorBatches(
        generated(IMAGES),
        batch=config.optimizer.batch,
        seed=config.seed,
        device=execution.device,
        augment=True,
        channels_last=True,
    )


def data_and_steps(
    configs: dict[str, Config], images: Batches, execution: Execution
) -> dict[str, Callable[[], None]]:
    """What is timed: an epoch's order, one batch, and by the names of `configs` a step on one."""

    def order() -> None:
        epoch_order(images.sizes["train"], 0, 0).to(execution.device)
        execution.synchronise()

    stream = _endless(images)

    def batch() -> None:
        next(stream)
        execution.synchronise()

    steps = {
        name: _step(Training(config, execution, images), _endless(images))
        for name, config in configs.items()
    }
    return {ORDER: order, DATA: batch, **steps}


def _step(training: Training, stream: Iterator[Batch]) -> Callable[[], None]:
    def step() -> None:
        training.advance(*next(stream))
        training.execution.synchronise()

    return step


def _endless(images: Batches) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from images.train(epoch)


def data_shares(rounds: list[dict[str, float]], steps_per_epoch: int) -> dict[str, Timing]:
    """The share of a training step that is data, round by round, by the names of the steps.

    The order of an epoch is drawn once for all its steps, so each bears its part.
    """
    return {
        name: Timing(
            tuple(
                (seconds[DATA] + seconds[ORDER] / steps_per_epoch)
                / (seconds[name] + seconds[ORDER] / steps_per_epoch)
                for seconds in rounds
            )
        )
        for name in rounds[0]
        if name not in (ORDER, DATA)
    }
