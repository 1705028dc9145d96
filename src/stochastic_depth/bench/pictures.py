"""How fast the pictures of a folder are decoded, and how fast a network takes them."""

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.extras import require
from stochastic_depth.randomness import generator
from stochastic_depth.timing import take_turns
from stochastic_depth.train.config import Config
from stochastic_depth.train.execution import Execution
from stochastic_depth.train.training import Training

HEIGHT, WIDTH = 375, 500
"""Of most of ImageNet's pictures, whose files take 108 KB on average."""
QUALITY = 95


def generated(number: int) -> Tensor:
    """A picture with detail of every size, as photographs have: uint8 [3, HEIGHT, WIDTH].

    Octaves of noise, each twice as fine as the one before it, and weaker.
    """
    source, picture = generator("bench pictures", number), torch.zeros(1, 3, HEIGHT, WIDTH)
    for octave in range(8):
        coarse = torch.randn(1, 3, 3 * 2**octave, 4 * 2**octave, generator=source)
        picture += F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic") / 1.3**octave
    return (128 + 40 * picture[0]).clamp(0, 255).byte()


def write_tree(root: Path, pictures: int) -> None:
    """Write `pictures` generated JPEG files for training and two for evaluation, in two classes."""
    image = require("PIL.Image", "data")
    for part, count in (("train", pictures), ("val", 2)):
        for number in range(count):
            path = root / part / f"class{number % 2}" / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generated(number).permute(1, 2, 0).numpy()
            image.fromarray(pixels).save(path, quality=QUALITY)


def decoded(images: FolderBatches, workers: Sequence[int], repeats: int) -> Iterator[list[float]]:
    """For each round, the pictures a second with each number of workers: decoded, cut at random,
    scaled, mirrored and normalised."""
    for epoch in range(repeats):
        rates = {}
        for number in workers if epoch % 2 else reversed(workers):
            images.workers = number
            rates[number] = _decoded_a_second(images, epoch)
        yield [rates[number] for number in workers]


def _decoded_a_second(images: FolderBatches, epoch: int) -> float:
    """Once all workers are at work, each of which makes batches of its own."""
    stream = images.train(epoch)
    for _ in itertools.islice(stream, max(1, images.workers)):
        pass
    began = time.perf_counter()
    count = sum(len(labels) for _, labels in stream)
    return count / (time.perf_counter() - began)


def taken(
    configs: dict[str, Config], images: FolderBatches, execution: Execution, repeats: int
) -> Iterator[dict[str, float]]:
    """For each round, the seconds of a training step of each configuration, without its data."""
    images.workers = 0
    batch = next(images.train(0))
    steps = {}
    for name, config in configs.items():
        training = Training(config, execution, images)

        def step(training: Training = training) -> None:
            training.advance(*batch)
            execution.synchronise()

        steps[name] = step
    return take_turns(steps, repeats, warmup=1)
