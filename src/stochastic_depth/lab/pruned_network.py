"""A trained network that is pruned: some of its blocks are closed by their gates.

Its errors, its times and its size are measured, and the order in which to prune blocks.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochastic_depth.data.batching import Batch, Part
from stochastic_depth.export.depths import Progress, errors_of, pruning_order, seconds_of
from stochastic_depth.lab.sources import TrainedNetwork
from stochastic_depth.train.runtime import Runtime

Removed = tuple[int, ...]
"""The numbers of removed blocks, from 0, ascending."""


@dataclass(frozen=True)
class PrunedNetwork:
    """The blocks that are removed, and the BatchNorm statistics to use without them."""

    removed: Removed
    statistics: list[Tensor] | None
    """The result of `measure_statistics`; None for those of the training."""


@contextmanager
def prune(network: TrainedNetwork, pruned: PrunedNetwork) -> Iterator[nn.Module]:
    """While entered, the removed blocks of the network are closed; the others keep their p_l."""
    gates = [block not in pruned.removed for block in range(len(network.handle.blocks))]
    statistics = pruned.statistics
    normalised = with_statistics(network.model, statistics) if statistics else nullcontext()
    with network.handle.subnetwork(gates, scaled=True), normalised:
        yield network.model


def errors(
    network: TrainedNetwork, variants: Iterable[PrunedNetwork], part: Part, progress: Progress
) -> list[float]:
    """The error of each variant on a part of the images, in percent; each image is read once."""
    networks = [partial(prune, network, variant) for variant in variants]
    return errors_of(networks, network.images, part, network.run.runtime, progress)


def seconds_per_image(
    network: TrainedNetwork,
    removals: Sequence[Removed],
    batch: int,
    repeats: int,
    progress: Progress,
) -> dict[Removed, float]:
    """Seconds per image of a forward pass on `batch` test images: medians, in turns."""
    images, _ = next(iter(network.images.evaluate("test")))
    networks = {str(r): partial(prune, network, PrunedNetwork(r, None)) for r in removals}
    seconds = seconds_of(networks, images[:batch], network.run.runtime, repeats, progress)
    return {removed: seconds[str(removed)] for removed in removals}


def parameters_without(network: TrainedNetwork, removed: Removed) -> int:
    """The number of parameters of the network without the branches of removed blocks."""
    names = [name for block in removed for name in network.handle.blocks[block].parameters]
    gone = sum(network.model.get_parameter(name).numel() for name in names)
    return sum(p.numel() for p in network.model.parameters()) - gone


def measure_statistics(
    model: nn.Module, batches: Iterable[Batch], runtime: Runtime
) -> list[Tensor]:
    """Measure the running statistics of `model` on `batches`, without changing the model.

    As in torch.optim.swa_utils.update_bn, the result is the plain mean of the statistics of all
    batches. But here the model stays in evaluation mode, and only its normalisations are in
    training mode. So no gates are drawn, and the current subnetwork stays the same.

    Returns:
        The statistics for `with_statistics`. Those of blocks that did not run are of no use.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    modes = [norm.training for norm in norms]
    with with_statistics(model, _statistics(model)), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            for images, _ in batches:
                with runtime.autocast():
                    model(images)
        finally:
            for norm, momentum, training in zip(norms, momenta, modes, strict=True):
                norm.momentum, norm.training = momentum, training
        return [statistic.clone() for statistic in _statistics(model)]


@contextmanager
def with_statistics(model: nn.Module, statistics: Sequence[Tensor]) -> Iterator[None]:
    """While entered, `model` normalises by `statistics`; afterwards by its own statistics again."""
    mine = _statistics(model)
    before = [statistic.clone() for statistic in mine]
    _put(mine, statistics)
    try:
        yield
    finally:
        _put(mine, before)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for norm in _norms(model) for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def _put(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)


def choose_order(network: TrainedNetwork, choose_on: int, progress: Progress) -> list[int]:
    """All blocks in the order in which to remove them, by the loss on validation images.

    This takes L (L + 1) / 2 evaluations of `choose_on` images.
    """
    validation, blocks = network.images.sizes["validation"], len(network.handle.blocks)
    few = list(spread(network.images.evaluate("validation"), validation, choose_on))
    done = itertools.count(1)

    def batches() -> list[Batch]:
        progress("choosing", next(done), blocks * (blocks + 1) / 2)
        return few

    order = pruning_order(network.model, batches, network.run.runtime)
    return [dropped.block for dropped in order]


def spread(batches: Iterable[Batch], images: int, count: int) -> Iterator[Batch]:
    """Choose `count` of the `images` in `batches`, evenly: they may be sorted by class."""
    count = min(count, images)
    chosen = torch.arange(count) * images // count
    start = 0
    for pixels, labels in batches:
        here = chosen[(chosen >= start) & (chosen < start + len(labels))] - start
        if len(here):
            here = here.to(labels.device)
            yield pixels[here], labels[here]
        start += len(labels)
