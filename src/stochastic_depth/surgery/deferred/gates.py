"""What a gate does with the placeholders of its branch.

At the residual addition, a closed gate returns the shortcut; an open gate scales the branch and
adds it. Before that, a gate for some of the samples selects these from every value that enters the
branch.
"""

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.errors import GateError
from stochastic_depth.residual import with_shape_of
from stochastic_depth.surgery.addition_functions import ADD_IN_PLACE, scales_second
from stochastic_depth.surgery.deferred.placeholder import (
    GatedAddition,
    Node,
    Placeholder,
    operands,
    value,
    with_values,
)
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.surgery.record.rejected import SCALED
from stochastic_depth.surgery.rewrite.select_samples import select_drawn
from stochastic_depth.tensors import map_structure, promoted
from stochastic_depth.torch_private import function_around, recomputation


def additions_of(found: list[Placeholder]) -> tuple[GatedAddition, ...]:
    """The residual additions to whose branches the placeholders belong, each once."""
    additions = found[0]._node.additions if found else ()
    for placeholder in found[1:]:
        if placeholder._node.additions is not additions:
            additions = tuple(dict.fromkeys((*additions, *placeholder._node.additions)))
    return additions


def addition_at(
    additions: tuple[GatedAddition, ...], site: CallSite, args: tuple[Any, ...]
) -> GatedAddition | None:
    """The addition that is made of the operands `args` at `site`, or None.

    Blocks of one class, or in one loop, add at the same site. The shortcut or the branch may hold a
    value of another block's branch, whose own addition is made already then.
    """
    at_site = (each for each in additions if site in each.sites and not each.is_made)
    return next((each for each in at_site if _adds_branch(each, each.sites[site], args)), None)


def _adds_branch(addition: GatedAddition, side: int, args: tuple[Any, ...]) -> bool:
    """Whether the operands are a shortcut, at position `side`, and the branch of `addition`."""
    if len(args) < 2 or not isinstance(args[side], Tensor):
        return False
    shortcut = args[side]
    others = (arg for n, arg in enumerate(args) if n != side)
    own = isinstance(shortcut, Placeholder) and addition in shortcut._node.additions
    return not own and any(addition in p._node.additions for p in operands(others)[0])


def add(
    addition: GatedAddition, side: int, func: Any, name: str, args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """Make the residual addition `func(*args, **kwargs)` under the gate of `addition`.

    Args:
        side: the position of the shortcut in `args`.
        name: the name of `func`; an addition in place changes its first operand.

    Raises:
        GateError: when this call scales the shortcut, as the call on the example did not.
    """
    if side == 1 and scales_second(name, kwargs):
        raise GateError(f"block {addition.name!r}: in this pass {SCALED}")
    if addition.recomputed is not None:
        addition.recomputed += _checkpoints_around(addition)
    shortcut, target = args[side], args[0]
    changes = name in ADD_IN_PLACE
    if addition.gate.open:
        shortcut = with_values(shortcut)
        new = [shortcut if n == side else arg for n, arg in enumerate(args)]
        gate = addition.gate
        for n, operand in enumerate(new):
            if isinstance(operand, Placeholder):
                of_branch = addition in operand._node.additions
                new[n] = gate.scale(value(operand)) if of_branch else value(operand)
                if of_branch:  # a second factor, of `addcmul`, is not multiplied again
                    gate = gate._replace(factor=None)
            if gate.detached and n != side and isinstance(new[n], Tensor):  # both factors
                new[n] = new[n].detach()
        if changes and isinstance(target, Placeholder):
            func = {"addcmul_": torch.addcmul}.get(name, torch.add)
        result = func(*new, **kwargs)
        if not changes:
            result = with_shape_of(shortcut, result)
        if addition.without_graph:
            result = _RefusesBackward.apply(result, torch.zeros((), requires_grad=True), addition)
    elif changes and target is shortcut:
        result = shortcut
    else:
        result = promoted(shortcut, *addition.promotion) if addition.promotion else shortcut
        result = result.clone() if addition.copies or changes else result
    if changes and isinstance(target, Placeholder) and result is not target:
        # From now on it stands for this sum.
        target._node = Node.finished(target._node.tape, (), with_values(result))
        target._number = 0
    addition.reached += 1
    return result


def note_if_without_graph(additions: tuple[GatedAddition, ...]) -> None:
    """Note that a value of these branches was computed just now, without gradients, if it is within
    an `autograd.Function` that is to have gradients."""
    needing = [a for a in additions if a.recomputed is not None and not a.gate.detached]
    if needing and function_around(sys._getframe(), checkpoints=True):
        for addition in needing:
            addition.without_graph = True


class _RefusesBackward(torch.autograd.Function):
    """The identity of a sum whose branch has lost its graph."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, anchor: Tensor, addition: GatedAddition) -> Tensor:
        ctx.block = addition.name
        return total.detach()  # not a view, which must not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise GateError(
            f"block {ctx.block!r}: its branch has no gradient while its gate multiplies it, as by "
            "p_l in evaluation, because a value of it goes through an autograd.Function, which "
            "reentrant checkpointing is: write the addition in the forward method of the block, "
            "or give checkpoint use_reentrant=False"
        )


def _checkpoints_around(addition: GatedAddition) -> Iterator[Callable[[], bool]]:
    """The running checkpoints between the call of the owner and its addition."""
    frame = sys._getframe(2)
    while frame is not None and frame is not addition.caller:
        found = recomputation(frame)
        if found is not None:
            yield found
        frame = frame.f_back


def selected_values(
    values: Any, additions: tuple[GatedAddition, ...], site: Callable[[], Hashable]
) -> Any:
    """As `with_values`; under a gate for single samples, with the drawn samples only.

    They are selected from every tensor from outside the branches of `additions`.

    Args:
        site: returns what identifies the position in the code; called only under such a gate.
    """
    drawn = next((each for each in additions if each.gate.samples is not None), None)
    if drawn is None:
        return with_values(values)
    own = frozenset(additions)

    def select(tensor: Tensor, key: Hashable) -> Tensor:
        if isinstance(tensor, Placeholder):
            if not own.isdisjoint(tensor._node.additions):
                return value(tensor)
            tensor = value(tensor)
        return select_drawn(drawn.owner, drawn.gate, tensor, key)

    return map_structure(select, values, site(), objects=2)
