"""The share of a training step that is spent on data."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stochastic_depth.data import Batches, DataSet, Images, TensorBatches
from stochastic_depth.data.batching import Batch, epoch_order
from stochastic_depth.lab.bench.results import Rounds, milliseconds, table_of, time_in_turns
from stochastic_depth.lab.options import DataOptions
from stochastic_depth.lab.outcomes import CONSTANT
from stochastic_depth.randomness import generator
from stochastic_depth.timing import Timing
from stochastic_depth.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
)
from stochastic_depth.train.open import open_batches
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.train_state import TrainState

ORDER = "order of an epoch"


DATA = "data and augmentation"


IMAGES = 45_000
"""How many images are generated: as many as CIFAR-10 has without its validation images."""


def generate_images(images: int) -> DataSet:
    """Random pictures of CIFAR's shape, whose ten classes take turns."""

    def part(name: str, count: int) -> Images:
        pixels = torch.randint(
            256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator("bench", name)
        )
        return Images(pixels, torch.arange(count) % 10)

    classes = tuple(map(str, range(10)))
    few = part("held out", 10)
    return DataSet("generated", classes, part("train", images), few, few)


def open_images(config: Config, runtime: Runtime) -> Batches:
    """The batches that `config` trains on, cropped and flipped; generated without a folder."""
    if config.data.root is not None:
        return open_batches(config, runtime)
    return TensorBatches(
        generate_images(IMAGES),
        batch=config.optimizer.batch,
        seed=config.seed,
        device=runtime.device,
        augment=True,
    )


def data_and_steps(
    configs: dict[str, Config], images: Batches, runtime: Runtime
) -> dict[str, Callable[[], None]]:
    """The functions to time: an epoch's order, one batch, and a step on one of each config."""

    def order() -> None:
        epoch_order(images.sizes["train"], 0, 0).to(runtime.device)
        runtime.synchronise()

    stream = _endless(images)

    def batch() -> None:
        next(stream)
        runtime.synchronise()

    steps = {
        name: _step(TrainState(config, runtime, images), _endless(images))
        for name, config in configs.items()
    }
    return {ORDER: order, DATA: batch, **steps}


def _step(train_state: TrainState, stream: Iterator[Batch]) -> Callable[[], None]:
    def step() -> None:
        train_state.advance(*next(stream))
        train_state.runtime.synchronise()

    return step


def _endless(images: Batches) -> Iterator[Batch]:
    for epoch in itertools.count():
        yield from images.train(epoch)


def data_shares(rounds: list[dict[str, float]], steps_per_epoch: int) -> dict[str, Timing]:
    """The share of a training step that is spent on data, round by round, by name of the step.

    The order of an epoch is drawn once for all its steps, so each step bears its part.
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


@dataclass(frozen=True)
class DataResult:
    """The seconds of an epoch's order, a batch, and steps on batches."""

    timed: Rounds
    images: str
    """The name of the data set."""
    steps_per_epoch: int

    @property
    def shares(self) -> dict[str, Timing]:
        """As from `data_shares`."""
        return data_shares(self.timed.rounds, self.steps_per_epoch)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.timed.to_json(),
            "images": self.images,
            "steps_per_epoch": self.steps_per_epoch,
            "data_share": {name: share.median for name, share in self.shares.items()},
            "data_share_quartiles": {name: share.quartiles for name, share in self.shares.items()},
        }


def measure(options: DataOptions, runtime: Runtime, console: Console) -> DataResult:
    """Time the order of an epoch, a batch, and training steps on batches."""
    data = DataConfig("cifar10", options.root)
    model, optimizer = ModelConfig(depth=options.depth), OptimizerConfig(batch=options.batch)
    constant = Config(
        data=data, model=model, survival=SurvivalConfig("constant"), optimizer=optimizer
    )
    configs = {
        f"step, {CONSTANT}": constant,
        "step, p_L = 0.5": replace(constant, survival=SurvivalConfig("linear", 0.5)),
    }
    with console.status("reading the images"):
        images = open_images(constant, runtime)
    steps = data_and_steps(configs, images, runtime)
    timed = time_in_turns(steps, options.repeats, console)
    return DataResult(timed, images.name, images.steps_per_epoch)


def tables(result: DataResult, options: DataOptions, runtime: Runtime) -> Iterator[Table | str]:
    timings = result.timed.timings
    order = timings.pop(ORDER)
    title = f"ResNet-{options.depth}, batch {options.batch}, {result.images} images"
    yield table_of(title, runtime, timings, options.batch)
    yield f"{ORDER}: {milliseconds(order.median)} ms, once in {result.steps_per_epoch} steps"
    for name, share in result.shares.items():
        low, high = share.quartiles
        yield (
            f"data are {100 * share.median:.2f} % of a {name} "
            f"(quartiles {100 * low:.2f} to {100 * high:.2f})"
        )
