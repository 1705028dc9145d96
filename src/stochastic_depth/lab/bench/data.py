"""The cost of data: its share of a training step, and how fast pictures are decoded."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stochastic_depth.data import Batches, DataSet, Images, TensorBatches
from stochastic_depth.data.batching import Batch, epoch_order
from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.extras import require
from stochastic_depth.lab.bench.results import bench_table, milliseconds, shown, table_of, timings
from stochastic_depth.lab.options import DataOptions, PicturesOptions
from stochastic_depth.randomness import generator
from stochastic_depth.recipes import RECIPES
from stochastic_depth.timing import Timing, take_turns
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


def generated_images(images: int) -> DataSet:
    """Random pictures of CIFAR's shape, whose ten classes take turns."""

    def part(name: str, count: int) -> Images:
        pixels = torch.randint(
            256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator("bench", name)
        )
        return Images(pixels, torch.arange(count) % 10)

    classes = tuple(map(str, range(10)))
    few = part("held out", 10)
    return DataSet("generated", classes, part("train", images), few, few)


def augmented(config: Config, runtime: Runtime) -> Batches:
    """The batches that `config` trains on, cropped and flipped; generated without a folder."""
    if config.data.root is not None:
        return open_batches(config, runtime)
    return TensorBatches(
        generated_images(IMAGES),
        batch=config.optimizer.batch,
        seed=config.seed,
        device=runtime.device,
        augment=True,
        channels_last=True,
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


HEIGHT, WIDTH = 375, 500
"""The size in pixels of most ImageNet pictures, whose files have 108 KB on average."""
QUALITY = 95


def generated_picture(number: int) -> Tensor:
    """A picture with details of every size, as in photographs: uint8 [3, HEIGHT, WIDTH].

    It is a sum of octaves of noise, each twice as fine as the one before, and weaker.
    """
    source, picture = generator("bench pictures", number), torch.zeros(1, 3, HEIGHT, WIDTH)
    for octave in range(8):
        coarse = torch.randn(1, 3, 3 * 2**octave, 4 * 2**octave, generator=source)
        picture += F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic") / 1.3**octave
    return (128 + 40 * picture[0]).clamp(0, 255).byte()


def write_tree(root: Path, pictures: int) -> None:
    """Write generated JPEG files in two classes: `pictures` for training, two for evaluation."""
    image = require("PIL.Image", "data")
    for part, count in (("train", pictures), ("val", 2)):
        for number in range(count):
            path = root / part / f"class{number % 2}" / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generated_picture(number).permute(1, 2, 0).numpy()
            image.fromarray(pixels).save(path, quality=QUALITY)


def decoded(images: FolderBatches, workers: Sequence[int], repeats: int) -> Iterator[list[float]]:
    """For each round, how many pictures each number of workers prepares in a second.

    Pictures are decoded, cut at random, scaled, mirrored and normalised.
    """
    for epoch in range(repeats):
        rates = {}
        for number in workers if epoch % 2 else reversed(workers):
            images.workers = number
            rates[number] = _decoded_a_second(images, epoch)
        yield [rates[number] for number in workers]


def _decoded_a_second(images: FolderBatches, epoch: int) -> float:
    """Pictures per second, from when all workers run; each prepares whole batches."""
    stream = images.train(epoch)
    for _ in itertools.islice(stream, max(1, images.workers)):
        pass
    began = time.perf_counter()
    count = sum(len(labels) for _, labels in stream)
    return count / (time.perf_counter() - began)


def taken(
    configs: dict[str, Config], images: FolderBatches, runtime: Runtime, repeats: int
) -> Iterator[dict[str, float]]:
    """For each round, the seconds of a training step of each configuration, without its data."""
    images.workers = 0
    batch = next(images.train(0))
    steps = {}
    for name, config in configs.items():
        train_state = TrainState(config, runtime, images)

        def step(train_state: TrainState = train_state) -> None:
            train_state.advance(*batch)
            runtime.synchronise()

        steps[name] = step
    return take_turns(steps, repeats, warmup=1)


def bench_data(options: DataOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    """Time the order of an epoch, a batch, and training steps on batches."""
    data = DataConfig("cifar10", options.root)
    model, optimizer = ModelConfig(depth=options.depth), OptimizerConfig(batch=options.batch)
    constant = Config(
        data=data, model=model, survival=SurvivalConfig("constant"), optimizer=optimizer
    )
    configs = {
        "step, constant depth": constant,
        "step, p_L = 0.5": replace(constant, survival=SurvivalConfig("linear", 0.5)),
    }
    with console.status("reading the images"):
        images = augmented(constant, runtime)
    steps = data_and_steps(configs, images, runtime)
    rounds = list(shown(take_turns(steps, options.repeats), options.repeats, console))
    timed = timings(rounds)
    title = f"ResNet-{options.depth}, batch {options.batch}, {images.name} images"
    console.print(
        table_of(title, runtime, {n: t for n, t in timed.items() if n != ORDER}, options.batch),
        f"{ORDER}: {milliseconds(timed[ORDER].median)} ms, once in {images.steps_per_epoch} steps",
    )
    shares = data_shares(rounds, images.steps_per_epoch)
    for name, share in shares.items():
        low, high = share.quartiles
        console.print(
            f"data are {100 * share.median:.2f} % of a {name} "
            f"(quartiles {100 * low:.2f} to {100 * high:.2f})",
        )
    return {
        "images": images.name,
        "steps_per_epoch": images.steps_per_epoch,
        "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
        "data_share": {name: share.median for name, share in shares.items()},
        "data_share_quartiles": {name: share.quartiles for name, share in shares.items()},
    }


def bench_pictures(options: PicturesOptions, runtime: Runtime, console: Console) -> dict[str, Any]:
    with ExitStack() as stack:
        root = options.root
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with console.status("writing pictures"):
                write_tree(root, options.pictures)
        return _measured_pictures(options, root, runtime, console)


def _measured_pictures(
    options: PicturesOptions, root: Path, runtime: Runtime, console: Console
) -> dict[str, Any]:
    images = FolderBatches(
        root,
        batch=options.batch,
        seed=0,
        device=runtime.device,
        workers=0,
        channels_last=True,
        train=options.pictures,
    )
    recipe = RECIPES["imagenet-resnet152"]()
    stochastic = replace(
        recipe,
        model=ModelConfig("imagenet-resnet", options.depth),
        optimizer=replace(recipe.optimizer, batch=options.batch),
    )
    configs = {
        "constant depth": replace(stochastic, survival=SurvivalConfig("constant")),
        "p_L = 0.5": stochastic,
    }
    rates = list(shown(decoded(images, options.workers, options.repeats), options.repeats, console))
    steps = shown(
        taken(configs, images, runtime, options.repeats), options.repeats, console, "training"
    )
    takes = {name: options.batch / t.median for name, t in timings(list(steps)).items()}
    by_workers = dict(zip(options.workers, zip(*rates, strict=True), strict=True))
    cores = (
        runtime.threads if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0))
    )
    console.print(_pictures_table(runtime, by_workers, takes))
    console.print(
        f"{cores} core(s) for decoding and training; ResNet-{options.depth} takes "
        + ", ".join(f"{rate:,.1f} a second at {name}" for name, rate in takes.items()),
    )
    return {
        "cores": cores,
        "load": os.getloadavg()[0],
        "file_bytes": statistics.fmean(p.stat().st_size for p in root.glob("train/*/*")),
        "decoded_per_second": by_workers,
        "taken_per_second": takes,
    }


def _pictures_table(
    runtime: Runtime, by_workers: dict[int, tuple[float, ...]], takes: dict[str, float]
) -> Table:
    columns = ["median\npictures/s", "quartiles\npictures/s"]
    columns += [f"of what is taken\nat {name}" for name in takes]
    title = "decoded, cut and scaled to 224 x 224"
    table = bench_table(title, runtime, "workers", *columns)
    for workers, rates in by_workers.items():
        rate = Timing(rates)
        (low, high), median = rate.quartiles, rate.median
        table.add_row(
            str(workers),
            f"{median:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            *(f"{median / rate:,.1f} x" for rate in takes.values()),
        )
    return table
