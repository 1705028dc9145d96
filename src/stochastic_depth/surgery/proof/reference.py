"""The reference for closed blocks; it executes all branches.

It is the original model, in which some additions return their shortcut, in the dtype of the sum.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.addition_functions import ADD_IN_PLACE, ADDITIONS, by_position
from stochastic_depth.surgery.blocks import FoundBlock, unsupported
from stochastic_depth.surgery.edits import AdditionEdit
from stochastic_depth.surgery.frames import CallSite, call_site_of, locations_in
from stochastic_depth.surgery.record.rejected import SHORTCUT_BROADCAST


@contextmanager
def bypassed(
    blocks: Iterable[FoundBlock], keep: Tensor | None = None, factor: float = 0.0
) -> Iterator[None]:
    """While entered, the additions of `blocks` return their shortcut. The model must have no gates.

    Args:
        keep: bool [batch], the samples for which the branches are still added.
        factor: what the branches are multiplied by, if they are added for all samples. It must be
            0 for `Residual` units, whose activation is part of the block.
    """
    additions: list[tuple[nn.Module, AdditionEdit, FoundBlock]] = []
    occurrences: dict[tuple[CallSite, int], tuple[int, FoundBlock]] = {}
    with ExitStack() as entered:
        for block in blocks:
            if block.training_only and not block.module.training:
                continue  # it does not run here, and other blocks may add in the same expression
            additions += [(*addition, block) for unit in block.units for addition in unit.additions]
            for unit in block.units:
                here = [e for e in unit.occurrences if e.training == block.module.training]
                events = here or unit.occurrences  # no pass in training mode was recorded
                occurrences |= {(e.site, e.index): (e.side, block) for e in events}
            whole = [u.edits[0][0] for u in block.units if not u.additions and not u.occurrences]
            for module in whole:
                entered.enter_context(_returns(module, lambda module, x: x, keep, factor))
            if isinstance(block.module, Residual):
                entered.enter_context(_returns(block.module, _around, keep, factor))
        entered.enter_context(_Bypass(additions, occurrences, keep, factor))
        yield


class _Bypass(TorchFunctionMode):
    """Makes some additions return their shortcut; it recognises them by their source location."""

    def __init__(
        self,
        additions: list[tuple[nn.Module, AdditionEdit, FoundBlock]],
        occurrences: dict[tuple[CallSite, int], tuple[int, FoundBlock]],
        keep: Tensor | None,
        factor: float,
    ) -> None:
        super().__init__()
        self.additions: dict[nn.Module, list[tuple[AdditionEdit, FoundBlock]]] = {}
        for module, edit, block in additions:
            self.additions.setdefault(module, []).append((edit, block))
        self.occurrences, self.keep, self.factor = occurrences, keep, factor
        self.reached: Counter[CallSite] = Counter()
        """How often each expression was evaluated."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_addition = getattr(func, "__name__", "") in ADDITIONS
        if is_addition:
            args, kwargs = by_position(args, kwargs)
        if is_addition and len(args) >= 2:
            site = call_site_of(sys._getframe(1))
            found = self.occurrences.get((site, self.reached[site]))
            self.reached[site] += 1
            if found is not None:
                return self._closed(func, args, kwargs, *found)
            for module, location in locations_in(self.additions, sys._getframe(1)):
                for edit, block in self.additions[module]:
                    if edit.location == location:
                        return self._closed(func, args, kwargs, edit.side, block)
        return func(*args, **kwargs)

    def _closed(
        self, func: Callable[..., Any], args: tuple, kwargs: dict, side: int, block: FoundBlock
    ) -> Tensor:
        in_place = getattr(func, "__name__", "") in ADD_IN_PLACE
        shape, dtype = _form_of_sum(args, in_place)
        if self.keep is None and args[side].shape != shape:
            raise unsupported(block.name, block.module, SHORTCUT_BROADCAST)
        result = args[side].to(dtype, copy=True)
        if self.keep is not None:
            result = _mixed(func(args[0].clone(), *args[1:], **kwargs), result, self.keep)
        elif self.factor:
            scaled = list(args)
            scaled[side], scaled[1 - side] = result, args[1 - side] * self.factor
            result = func(*scaled, **kwargs)
        if in_place:
            return args[0].copy_(result)
        return result


def _form_of_sum(operands: Sequence[Any], in_place: bool) -> tuple[torch.Size, torch.dtype]:
    """The shape and the dtype of the sum of `operands`."""
    tensors = [each for each in operands if isinstance(each, Tensor)]
    if in_place:
        return tensors[0].shape, tensors[0].dtype
    shapes = {tensor.shape for tensor in tensors}  # broadcasting fails for nested tensors
    shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*shapes)
    return shape, functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


@contextmanager
def _returns(
    module: Any, closed: Callable[[Any, Tensor], Tensor], keep: Tensor | None, factor: float
) -> Iterator[None]:
    """While entered, `module` returns `closed(module, x)`, where x is its first argument."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        shortcut = closed(module, args[0])
        if factor:
            return shortcut + (output - shortcut) * factor
        return _mixed(output, shortcut, keep)

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
            f"a residual addition has the shape {list(output.shape)}, and its first dimension is "
            f'not the batch ({len(keep)}): use gate="batch" for this model',
            of_model=True,
        )
    return torch.where(keep.view(-1, *[1] * (output.ndim - 1)), output, shortcut)
