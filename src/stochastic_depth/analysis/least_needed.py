"""Which blocks a trained network can do without: found greedily on the validation part."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from stochastic_depth.analysis.trained import Progress, Trained
from stochastic_depth.data.protocol import Batch
from stochastic_depth.export import drop_order
from stochastic_depth.train.step import evaluate


def chosen_order(network: Trained, choose_on: int, progress: Progress) -> list[int]:
    """All blocks, the least needed one on the validation part first, as it was trained.

    L (L + 1) / 2 evaluations of `choose_on` images.
    """
    validation, blocks = network.images.sizes["validation"], len(network.handle.blocks)
    few = list(spread(network.images.evaluate("validation"), validation, choose_on))
    done = itertools.count(1)

    def loss(model: nn.Module) -> float:
        progress("choosing", next(done), blocks * (blocks + 1) / 2)
        return evaluate(model, few, network.run.execution).loss

    return [dropped.block for dropped in drop_order(network.model, loss)]


def spread(batches: Iterable[Batch], images: int, count: int) -> Iterator[Batch]:
    """`count` of the `images` in `batches`, evenly spread, since they may be sorted by class."""
    count = min(count, images)
    chosen = torch.arange(count) * images // count
    start = 0
    for pixels, labels in batches:
        here = chosen[(chosen >= start) & (chosen < start + len(labels))] - start
        if len(here):
            here = here.to(labels.device)
            yield pixels[here], labels[here]
        start += len(labels)
