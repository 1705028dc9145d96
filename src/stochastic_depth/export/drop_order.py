"""`sd.drop_order`: find the blocks that are needed least."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from stochastic_depth.handle import Handle
from stochastic_depth.surgery.applied import handle_of
from stochastic_depth.surgery.model_state import in_evaluation


@dataclass(frozen=True)
class Dropped:
    """One step of `drop_order`: a block that is closed from then on."""

    block: int
    """Position of the block, from 0."""
    loss: float
    """The loss without this block and all blocks that were dropped before."""
    evaluations: int
    """How often the loss was evaluated to choose this block."""


def drop_order(model: nn.Module, loss: Callable[[nn.Module], float]) -> Iterator[Dropped]:
    """Close the blocks of `model` one by one, each time the one whose closing costs least.

    The search is greedy. To choose the n-th of L blocks, the loss is evaluated L - n + 1 times; for
    all of them together, L (L + 1) / 2 times. The iterator may be stopped at any time. `model` is
    not changed. A loss of nan counts as the largest.

    Args:
        model: a model that `sd.apply` was called on.
        loss: called with the model in evaluation mode with some of its blocks closed; returns its
            loss, for example over the validation images.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.

    Examples:
        >>> model = sd.models.CifarResNet(20)
        >>> handle = sd.apply(model)
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
        >>> def loss(network):
        ...     return nn.functional.cross_entropy(network(images), labels).item()
        >>> order = itertools.islice(sd.drop_order(model, loss), 2)
        >>> first = [dropped.block for dropped in order]
        >>> sd.truncate(model, [block for block in range(9) if block not in first], images)
        >>> len(sd.apply(model).blocks)
        7
    """
    return _dropped(model, handle_of(model), loss)


def _dropped(
    model: nn.Module, handle: Handle, loss: Callable[[nn.Module], float]
) -> Iterator[Dropped]:
    left = list(range(len(handle.blocks)))

    def without(block: int) -> float:
        gates = [other in left and other != block for other in range(len(handle.blocks))]
        with handle.subnetwork(gates, scaled=True):
            return loss(model)

    while left:
        with in_evaluation(model):
            losses = {block: without(block) for block in left}
        best = min(left, key=lambda block: (math.isnan(losses[block]), losses[block]))
        left.remove(best)
        yield Dropped(best, losses[best], len(losses))
