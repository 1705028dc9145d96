"""What a process gives to collectives, and what that makes it send."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Collectives(TorchDispatchMode):
    """While entered, counts collectives and the bytes that this process must send for them.

    By the algorithms that send least: of n ranks each sends 2 (n - 1) / n of an all-reduced tensor,
    (n - 1) / n of one that is gathered whole or reduced and scattered.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self._passed_on = (ranks - 1) / ranks
        self.calls = 0
        self.bytes = 0.0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if operator.namespace == "c10d":
            kind = operator._opname.strip("_")
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            if kind in ("allreduce", "allreduce_coalesced"):
                self._count(2 * sum(t.nbytes for t in tensors))
            elif kind in ("allgather_base", "reduce_scatter_base"):
                self._count(max(t.nbytes for t in tensors))
            elif kind == "broadcast":
                self._count(tensors[0].nbytes)
        return operator(*args, **(kwargs or {}))

    def _count(self, whole: int) -> None:
        self.calls += 1
        self.bytes += self._passed_on * whole
