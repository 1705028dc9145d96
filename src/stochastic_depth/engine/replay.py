"""How the pieces of a program are run again and again: as they are, or as captured CUDA graphs."""

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]


class Replay(Protocol):
    """Turns work on static buffers into something that does it again.

    `keeps` says that the memory which the work allocates stays its own.
    """

    keeps: bool

    def warm_up(self, work: Work) -> None:
        """Do all the work, if it must have been done before it can be recorded."""
        ...

    def __call__(self, work: Work) -> Work: ...


class Eagerly:
    """The work itself."""

    keeps = False

    def warm_up(self, work: Work) -> None:
        pass

    def __call__(self, work: Work) -> Work:
        return work


class CudaGraphs:
    """One CUDA graph for each piece of work, all in one pool of memory.

    A piece may reuse what an earlier one has used for its own, but nothing that is still referred
    to: what a forward piece saves stays until its backward piece. Pieces must be captured in the
    order in which they will run; they may then be left out.
    """

    keeps = True

    def __init__(self, device: torch.device, rounds: int = 3) -> None:
        self._device, self._rounds = device, rounds
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """Libraries choose their algorithms, and compilers compile, before anything is captured."""
        current = torch.cuda.current_stream(self._device)
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(self._rounds):
                work()
        current.wait_stream(aside)

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay
