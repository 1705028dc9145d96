"""A trained network without some of its blocks: its errors, its time and its size."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from stochastic_depth.analysis.recalibration import with_statistics
from stochastic_depth.analysis.trained import Progress, Trained
from stochastic_depth.data.protocol import Part
from stochastic_depth.timing import Timing, take_turns

Removed = tuple[int, ...]
"""The numbers of removed blocks, from 0, ascending."""


@dataclass(frozen=True)
class Thinned:
    """A network without some of its blocks, and with what it normalises."""

    removed: Removed
    statistics: list[Tensor] | None
    """From `recalibrated`; None for those it was trained with."""


@contextmanager
def as_thinned(network: Trained, thinned: Thinned) -> Iterator[None]:
    """While entered, the network without these blocks; the others keep their p_l."""
    gates = [block not in thinned.removed for block in range(len(network.handle.blocks))]
    statistics = thinned.statistics
    normalised = with_statistics(network.model, statistics) if statistics else nullcontext()
    with network.handle.subnetwork(gates, scaled=True), normalised:
        yield


@torch.inference_mode()
def errors(
    network: Trained, variants: Iterable[Thinned], part: Part, progress: Progress
) -> list[float]:
    """Percent of a part's images, of each variant; every image is read once."""
    variants = list(variants)
    wrong: list[Tensor | int] = [0] * len(variants)
    images_seen, total = 0, network.images.sizes[part] * len(variants)
    for images, labels in network.images.evaluate(part):
        for number, variant in enumerate(variants):
            with as_thinned(network, variant), network.run.execution.autocast():
                logits = network.model(images)
            wrong[number] = wrong[number] + (logits.argmax(1) != labels).sum()
            progress(f"{part} error", images_seen * len(variants) + number * len(labels), total)
        images_seen += len(labels)
    return [100 * float(count) / images_seen for count in wrong]


@torch.inference_mode()
def seconds_per_image(
    network: Trained, removals: Sequence[Removed], batch: int, repeats: int, progress: Progress
) -> dict[Removed, float]:
    """Of the forward pass on `batch` test images: the median of `repeats` rounds, in turns."""
    execution = network.run.execution
    images, _ = next(iter(network.images.evaluate("test")))
    images = images[:batch]

    def run(removed: Removed) -> None:
        with as_thinned(network, Thinned(removed, None)), execution.autocast():
            network.model(images)
        execution.synchronise()

    alternatives = {str(removed): partial(run, removed) for removed in removals}
    rounds = []
    for seconds in take_turns(alternatives, repeats, warmup=1):
        rounds.append(seconds)
        progress("timing", len(rounds), repeats)
    return {
        removed: Timing(tuple(r[str(removed)] for r in rounds)).median / len(images)
        for removed in removals
    }


def parameters_without(network: Trained, removed: Removed) -> int:
    """Of the network that is left: branches of removed blocks are gone."""
    names = [name for block in removed for name in network.handle.blocks[block].parameters]
    gone = sum(network.model.get_parameter(name).numel() for name in names)
    return sum(p.numel() for p in network.model.parameters()) - gone
