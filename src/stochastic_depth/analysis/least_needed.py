"""Which blocks a trained network can do without: found greedily on the validation part."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from stochastic_depth.analysis.removal import Thinned, as_thinned
from stochastic_depth.analysis.trained import Progress, Trained
from stochastic_depth.data.protocol import Batch
from stochastic_depth.train.step import evaluate


def chosen_order(network: Trained, choose_on: int, progress: Progress) -> list[int]:
    """All blocks, the least needed one on the validation part first, as it was trained.

    L (L + 1) / 2 evaluations of `choose_on` images.
    """
    validation, blocks = network.images.sizes["validation"], len(network.depth.blocks)
    few = list(spread(network.images.evaluate("validation"), validation, choose_on))
    done = 0

    def loss(removed: Sequence[int]) -> float:
        nonlocal done
        done += 1
        progress("choosing", done, blocks * (blocks + 1) / 2)
        with as_thinned(network, Thinned(tuple(removed), None)):
            return evaluate(network.model, few, network.run.execution).loss

    return least_needed(blocks, loss)


def least_needed(blocks: int, loss: Callable[[Sequence[int]], float]) -> list[int]:
    """The order in which blocks 0..blocks-1 are removed greedily.

    Each time the one whose removal, besides those before it, leaves the lowest loss; the first of
    equals.
    """
    removed: list[int] = []
    while len(removed) < blocks:
        left = [block for block in range(blocks) if block not in removed]
        removed.append(min(left, key=lambda block: loss([*removed, block])))
    return removed


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
