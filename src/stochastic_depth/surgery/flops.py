"""Floating-point operations, counted by running: 2 for each multiply-add."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class CountFlops(TorchDispatchMode):
    """While entered, adds up the FLOPs of products, convolutions and attention in `total`.

    By PyTorch's own formulas. Its `FlopCounterMode` keeps account of modules besides, for which it
    needs hooks in the backward graph that not every model lets it have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=out)
        return out
