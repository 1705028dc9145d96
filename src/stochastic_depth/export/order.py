"""Which blocks a network needs least: chosen one after the other on data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from stochastic_depth.handle import Handle
from stochastic_depth.surgery.apply import handle_of


@dataclass(frozen=True)
class Dropped:
    """One block, closed for the rest of the search."""

    block: int
    """Its position, from 0."""
    loss: float
    """Without it and all before."""
    evaluations: int
    """How often the loss was taken for this choice."""


def drop_order(model: nn.Module, loss: Callable[[nn.Module], float]) -> Iterator[Dropped]:
    """Close the blocks of `model` one after the other, each time the one that costs least.

    Greedy: to choose the n-th of L blocks the loss is taken L - n + 1 times, for all of them
    L (L + 1) / 2 times. The iterator may be left at any time. `model` stays as it is.

        order = [dropped.block for dropped in itertools.islice(sd.drop_order(model, loss), 10)]
        sd.truncate(model, [n for n in range(54) if n not in order], example)

    Args:
        model: one that `sd.apply` was given.
        loss: of the model in evaluation mode, without some of its blocks; say over the validation
            images.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
    """
    return _dropped(model, handle_of(model), loss)


def _dropped(
    model: nn.Module, handle: Handle, loss: Callable[[nn.Module], float]
) -> Iterator[Dropped]:
    was_training = model.training
    left = list(range(len(handle.blocks)))

    def without(block: int) -> float:
        gates = [other in left and other != block for other in range(len(handle.blocks))]
        with handle.subnetwork(gates, scaled=True):
            return loss(model)

    while left:
        model.eval()
        try:
            losses = {block: without(block) for block in left}
        finally:
            model.train(was_training)
        best = min(left, key=lambda block: losses[block])
        left.remove(best)
        yield Dropped(best, losses[best], len(losses))
