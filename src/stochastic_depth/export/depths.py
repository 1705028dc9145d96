"""Measure a trained network at several depths: which blocks to drop first, errors and times."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from statistics import median
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from stochastic_depth.data import Batches
from stochastic_depth.data.batching import Batch, Part
from stochastic_depth.export.drop_order import drop_order
from stochastic_depth.export.remove_blocks import remove_blocks
from stochastic_depth.surgery.applied import handle_of
from stochastic_depth.timing import take_turns
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import evaluate


class Progress(Protocol):
    """Called with the name of a stage, how much of it is done, and how much there is in all."""

    def __call__(self, doing: str, done: float, total: float) -> None: ...


def pruning_order(
    model: nn.Module,
    count: int,
    batches: Callable[[], Iterable[Batch]],
    runtime: Runtime,
    progress: Progress,
) -> list[int]:
    """The `count` blocks of `model` to remove first, in this order, by the loss on `batches`.

    See `drop_order`.

    Args:
        model: a model that `sd.apply` was called on.
        batches: called for each evaluation; returns the validation images.
    """
    blocks, done = len(handle_of(model).blocks), 0

    def loss(model: nn.Module) -> float:
        nonlocal done
        done += 1
        progress("choosing", done, sum(range(blocks, blocks - count, -1)))
        return evaluate(model, batches(), runtime).loss

    return [dropped.block for dropped in islice(drop_order(model, loss), count)]


def without_blocks(
    plain: nn.Module, removed: Sequence[int], recalibrate: Iterable[Tensor] | None = None
) -> nn.Module:
    """A copy of a plain network without the blocks at the positions `removed`, for evaluation.

    It shares its parameters with `plain`.

    Args:
        recalibrate: images from which the BatchNorm statistics are measured again.
    """
    network = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
    remove_blocks(network, removed)
    if recalibrate is not None:
        update_bn(recalibrate, network)
    return network.eval()


@torch.inference_mode()
def errors_of(
    networks: Sequence[nn.Module],
    batches: Batches,
    part: Part,
    runtime: Runtime,
    progress: Progress,
) -> list[float]:
    """The error of each network on a part of the images, in percent; nan without images.

    Each image is read once, for all networks.
    """
    wrong: list[Tensor | int] = [0] * len(networks)
    seen, total = 0, batches.sizes[part] * len(networks)
    for pixels, labels in batches.evaluate(part):
        for number, network in enumerate(networks):
            with runtime.autocast():
                logits = network(pixels)
            wrong[number] = wrong[number] + (logits.argmax(1) != labels).sum()
            progress(f"{part} error", seen * len(networks) + number * len(labels), total)
        seen += len(labels)
    return [100 * float(count) / seen if seen else math.nan for count in wrong]


@torch.inference_mode()
def seconds_of(
    networks: Sequence[nn.Module],
    images: Tensor,
    runtime: Runtime,
    repeats: int,
    progress: Progress,
) -> list[float]:
    """Seconds per image of a forward pass on the batch `images`: medians over rounds, in turns."""

    def run(network: nn.Module) -> None:
        with runtime.autocast():
            network(images)
        runtime.synchronise()

    alternatives = {str(n): partial(run, network) for n, network in enumerate(networks)}
    rounds = []
    for seconds in take_turns(alternatives, repeats, warmup=1):
        rounds.append(seconds)
        progress("timing", len(rounds), repeats)
    return [median(seconds[name] for seconds in rounds) / len(images) for name in alternatives]


def parameters_of(network: nn.Module) -> int:
    """The number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())
