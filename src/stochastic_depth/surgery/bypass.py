"""What a closed block means, by an independent way: the addition returns its shortcut.

The whole original model runs, branches included; only the results of the chosen additions are
replaced. Slow, and the truth that modules with gates are held against.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.discovery.cuts import Sum, find_place
from stochastic_depth.surgery.discovery.discover import ADDITIONS
from stochastic_depth.surgery.find import Found


@contextmanager
def bypassed(blocks: Iterable[Found], keep: Tensor | None = None) -> Iterator[None]:
    """While entered, the additions of `blocks`, of a model without gates, return their shortcut.

    Args:
        keep: bool [batch]; the samples that the branches are added for all the same.
    """
    additions = []
    with ExitStack() as entered:
        for block in blocks:
            additions += [addition for unit in block.units for addition in unit.additions]
            whole = [unit.cuts[0][0] for unit in block.units if not unit.additions]
            for module in whole:
                entered.enter_context(_returns(module, lambda module, x: x, keep))
            if isinstance(block.module, Residual):
                entered.enter_context(_returns(block.module, _around, keep))
        entered.enter_context(_Bypass(additions, keep))
        yield


class _Bypass(TorchFunctionMode):
    def __init__(self, additions: list[tuple[nn.Module, Sum]], keep: Tensor | None) -> None:
        super().__init__()
        self.additions, self.keep = additions, keep

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ADDITIONS and len(args) == 2:
            for module, cut in self.additions:
                if find_place(module, sys._getframe(1)) == cut.place:
                    shortcut = args[0 if cut.shortcut == "left" else 1].clone()
                    if self.keep is None:
                        return shortcut
                    return _mixed(func(args[0].clone(), args[1]), shortcut, self.keep)
        return func(*args, **(kwargs or {}))


@contextmanager
def _returns(
    module: Any, closed: Callable[[Any, Tensor], Tensor], keep: Tensor | None
) -> Iterator[None]:
    """While entered, `module` returns what `closed` makes of it and its first argument."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return _mixed(output, closed(module, args[0]), keep)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _around(module: Residual, x: Tensor) -> Tensor:
    shortcut = x if module.shortcut is None else module.shortcut(x)
    return shortcut if module.activation is None else module.activation(shortcut.clone())


def _mixed(output: Tensor, shortcut: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return shortcut
    if len(output) != len(keep):
        raise UnsupportedBlockError(
            f"a residual addition is of a tensor {list(output.shape)}, which does not have the "
            f'{len(keep)} samples first: use gate="batch" for this model, or exclude='
        )
    return torch.where(keep.view(-1, *[1] * (output.ndim - 1)), output, shortcut)
