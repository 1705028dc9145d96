"""Measure a trained network at several depths: which blocks to drop first, errors and times."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn

from stochastic_depth.data import Batches
from stochastic_depth.data.batching import Batch, Part
from stochastic_depth.export.drop_order import Dropped, drop_order
from stochastic_depth.timing import take_turns
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import evaluate

Shallower = Callable[[], AbstractContextManager[nn.Module]]
"""Returns a context with a network in which some blocks are closed or removed."""


class Progress(Protocol):
    """Called with the name of a stage, how much of it is done, and how much there is in all."""

    def __call__(self, doing: str, done: float, total: float) -> None: ...


def silent(doing: str, done: float, total: float) -> None:
    """A `Progress` that shows nothing."""


def pruning_order(
    model: nn.Module, batches: Callable[[], Iterable[Batch]], runtime: Runtime
) -> Iterator[Dropped]:
    """All blocks of `model` in the order in which to remove them, by the loss on `batches`.

    See `drop_order`.

    Args:
        model: a model that `sd.apply` was called on.
        batches: called for each evaluation; returns the validation images.
    """
    return drop_order(model, lambda model: evaluate(model, batches(), runtime).loss)


@torch.inference_mode()
def errors_of(
    networks: Sequence[Shallower],
    images: Batches,
    part: Part,
    runtime: Runtime,
    progress: Progress = silent,
) -> list[float]:
    """The error of each network on a part of the images, in percent; nan without images.

    Each image is read once, for all networks.
    """
    wrong: list[Tensor | int] = [0] * len(networks)
    seen, total = 0, images.sizes[part] * len(networks)
    for pixels, labels in images.evaluate(part):
        for number, network in enumerate(networks):
            with network() as model, runtime.autocast():
                logits = model(pixels)
            wrong[number] = wrong[number] + (logits.argmax(1) != labels).sum()
            progress(f"{part} error", seen * len(networks) + number * len(labels), total)
        seen += len(labels)
    return [100 * float(count) / seen if seen else math.nan for count in wrong]


@torch.inference_mode()
def seconds_of(
    networks: Mapping[str, Shallower],
    images: Tensor,
    runtime: Runtime,
    repeats: int,
    progress: Progress = silent,
) -> dict[str, float]:
    """Seconds per image of a forward pass on the batch `images`: medians over rounds, in turns."""

    def run(network: Shallower) -> None:
        with network() as model, runtime.autocast():
            model(images)
        runtime.synchronise()

    alternatives = {name: (lambda one=one: run(one)) for name, one in networks.items()}
    rounds = []
    for seconds in take_turns(alternatives, repeats, warmup=1):
        rounds.append(seconds)
        progress("timing", len(rounds), repeats)
    return {name: median(seconds[name] for seconds in rounds) / len(images) for name in networks}
