"""Memory for activations that is taken and given back within a step."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor


class Buffers:
    """Keeps what is given back: memory from the system is slow to touch for the first time."""

    def __init__(self) -> None:
        self._free: defaultdict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, like: Tensor) -> Tensor:
        """One of the shape, type and layout of `like`, with anything in it."""
        free = self._free[like.shape, like.dtype]
        return free.pop() if free else torch.empty_like(like)

    def give(self, *tensors: Tensor) -> None:
        """Nobody reads them any more."""
        for tensor in tensors:
            self._free[tensor.shape, tensor.dtype].append(tensor)

    def __iter__(self) -> Iterator[Tensor]:
        """All that are free."""
        for free in self._free.values():
            yield from free
