"""Which blocks a network needs least: chosen one after the other on data."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.gates import Gate
from stochastic_depth.surgery.apply import depth_of


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
    L (L + 1) / 2 times. The iterator may be left at any time, and leaves `model` as it was.

        order = [dropped.block for dropped in itertools.islice(sd.drop_order(model, loss), 10)]
        sd.truncate(model, [n for n in range(54) if n not in order], example)

    Args:
        model: one that `sd.apply` was given.
        loss: of the model in evaluation mode, say over the validation images.

    Raises:
        ApplyError: when `model` is not one that `sd.apply` was given.
    """
    return _dropped(model, depth_of(model).blocks, loss)


def _dropped(
    model: nn.Module, blocks: list[Any], loss: Callable[[nn.Module], float]
) -> Iterator[Dropped]:
    before = [[gates.evaluation for gates in block.gates] for block in blocks]
    was_training = model.training
    model.eval()
    left = list(range(len(blocks)))
    try:
        while left:
            losses = {}
            for number in left:
                _set(blocks[number], [Gate(open=False)] * len(blocks[number].gates))
                losses[number] = loss(model)
                _set(blocks[number], before[number])
            best = min(losses, key=lambda number: losses[number])
            _set(blocks[best], [Gate(open=False)] * len(blocks[best].gates))
            left.remove(best)
            yield Dropped(best, losses[best], len(losses))
    finally:
        for block, gates in zip(blocks, before, strict=True):
            _set(block, gates)
        model.train(was_training)


def _set(block: Any, gates: list[Gate]) -> None:
    for addition, gate in zip(block.gates, gates, strict=True):
        addition.evaluation = gate
