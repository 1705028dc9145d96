"""How fast pictures are decoded, and how fast a network takes them."""

import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.extras import require
from stochastic_depth.lab.bench.results import bench_table, time_in_turns, with_progress
from stochastic_depth.lab.options import PicturesOptions
from stochastic_depth.lab.outcomes import CONSTANT
from stochastic_depth.processes import cores
from stochastic_depth.randomness import generator
from stochastic_depth.recipes import RECIPES
from stochastic_depth.timing import Timing
from stochastic_depth.train.config import (
    Config,
    ModelConfig,
    SurvivalConfig,
)
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.train_state import TrainState

HEIGHT, WIDTH = 375, 500
"""The size in pixels of most ImageNet pictures, whose files have 108 KB on average."""


QUALITY = 95


def generate_picture(number: int) -> Tensor:
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
            pixels = generate_picture(number).permute(1, 2, 0).numpy()
            image.fromarray(pixels).save(path, quality=QUALITY)


def measure_decoding(
    images: FolderBatches, workers: Sequence[int], repeats: int
) -> Iterator[list[float]]:
    """For each round, how many pictures each number of workers prepares in a second.

    Pictures are decoded, cut at random, scaled, mirrored and normalised.
    """
    for epoch in range(repeats):
        rates = {}
        for number in workers if epoch % 2 else reversed(workers):
            images.workers = number
            rates[number] = _decoding_rate(images, epoch)
        yield [rates[number] for number in workers]


def _decoding_rate(images: FolderBatches, epoch: int) -> float:
    """Pictures per second, from when all workers run; each prepares whole batches."""
    stream = images.train(epoch)
    for _ in itertools.islice(stream, max(1, images.workers)):
        pass
    began = time.perf_counter()
    count = sum(len(labels) for _, labels in stream)
    return count / (time.perf_counter() - began)


def training_steps(
    configs: dict[str, Config], images: FolderBatches, runtime: Runtime
) -> dict[str, Callable[[], None]]:
    """A training step of each configuration, always on the same batch."""
    images.workers = 0
    batch = next(images.train(0))
    steps = {}
    for name, config in configs.items():
        train_state = TrainState(config, runtime, images)

        def step(train_state: TrainState = train_state) -> None:
            train_state.advance(*batch)
            runtime.synchronise()

        steps[name] = step
    return steps


@dataclass(frozen=True)
class PicturesResult:
    """Pictures per second, decoded and taken by training steps."""

    decoded: Mapping[int, Sequence[float]]
    """Of every round, by number of workers."""
    taken: Mapping[str, float]
    """By name of the training."""
    cores: int
    load: float
    file_bytes: float
    """The mean size of the files."""

    def to_json(self) -> dict[str, Any]:
        return {
            "clock": "perf_counter",
            "cores": self.cores,
            "load": self.load,
            "file_bytes": self.file_bytes,
            "decoded_per_second": self.decoded,
            "taken_per_second": self.taken,
        }


def measure(options: PicturesOptions, runtime: Runtime, console: Console) -> PicturesResult:
    """Measure how fast pictures are decoded, and how fast a network takes them."""
    with ExitStack() as stack:
        root = options.root
        if root is None:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with console.status("writing pictures"):
                write_tree(root, options.pictures)
        return _measure_in(root, options, runtime, console)


def _measure_in(
    root: Path, options: PicturesOptions, runtime: Runtime, console: Console
) -> PicturesResult:
    images = FolderBatches(
        root,
        batch=options.batch,
        seed=0,
        device=runtime.device,
        workers=0,
        train=options.pictures,
    )
    recipe = RECIPES["imagenet-resnet152"]()
    stochastic = replace(
        recipe,
        model=ModelConfig("imagenet-resnet", options.depth),
        optimizer=replace(recipe.optimizer, batch=options.batch),
    )
    configs = {
        CONSTANT: replace(stochastic, survival=SurvivalConfig("constant")),
        "p_L = 0.5": stochastic,
    }
    decoding = measure_decoding(images, options.workers, options.repeats)
    rates = list(with_progress(decoding, options.repeats, console))
    steps = training_steps(configs, images, runtime)
    timed = time_in_turns(steps, options.repeats, console, warmup=1, doing="training")
    return PicturesResult(
        dict(zip(options.workers, zip(*rates, strict=True), strict=True)),
        {name: options.batch / timing.median for name, timing in timed.timings.items()},
        cores(),
        os.getloadavg()[0],
        statistics.fmean(path.stat().st_size for path in root.glob("train/*/*")),
    )


def tables(
    result: PicturesResult, options: PicturesOptions, runtime: Runtime
) -> Iterator[Table | str]:
    yield _pictures_table(runtime, result.decoded, result.taken)
    yield (
        f"{result.cores} core(s) for decoding and training; ResNet-{options.depth} takes "
        + ", ".join(f"{rate:,.1f} a second at {name}" for name, rate in result.taken.items())
    )


def _pictures_table(
    runtime: Runtime, by_workers: Mapping[int, Sequence[float]], takes: Mapping[str, float]
) -> Table:
    columns = ["median\npictures/s", "quartiles\npictures/s"]
    columns += [f"of what is taken\nat {name}" for name in takes]
    title = "decoded, cut and scaled to 224 x 224"
    table = bench_table(title, runtime, "workers", *columns)
    for workers, rates in by_workers.items():
        rate = Timing(tuple(rates))
        (low, high), median = rate.quartiles, rate.median
        table.add_row(
            str(workers),
            f"{median:,.0f}",
            f"{low:,.0f}-{high:,.0f}",
            *(f"{median / rate:,.1f} x" for rate in takes.values()),
        )
    return table
