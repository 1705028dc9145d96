"""Count the FLOPs of what really runs: products, convolutions and attention."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from stochastic_depth.torch_private import TorchDispatchMode

_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATTENTION],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATTENTION_BACKWARD
    ],
}
"""PyTorch's FLOP formulas by operator. It has none for attention on a CPU, which costs as much as
on a GPU."""
_RECURRENT = re.compile("rnn(?!_flatten)|lstm_mps")
"""Matches the names of operators that are a whole recurrent layer. They have no formula."""


class CountFlops(TorchDispatchMode):
    """While entered, adds up the FLOPs of products, convolutions and attention in `total`.

    `uncounted` has the number of calls, by operator, whose FLOPs no formula gives: recurrent layers
    (`nn.LSTM`), and operands that a formula does not know.

    PyTorch's `FlopCounterMode` also attributes them to modules. For that it needs hooks in the
    backward graph, which not every model allows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # queries of fake tensors, such as their device
            return NotImplemented
        formula, name = FORMULAS.get(func._overloadpacket), func._overloadpacket.__name__
        if formula is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            if _RECURRENT.search(name):
                self.uncounted[name] += 1
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        try:
            self.total += formula(*args, **kwargs, out_val=out)
        except Exception:  # it may not know the operands, such as nested tensors
            self.uncounted[name] += 1
        return out
