"""What a gate does with the placeholders of its branch.

At the residual addition a closed gate gives the shortcut, and an open one scales the branch and
adds it. On the way there a gate for some samples selects those of what comes in from outside of the
branch, and a gate whose branch only runs forward keeps it out of the autograd graph.
"""

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.gates import Gate
from stochastic_depth.surgery.deferred.placeholder import (
    Node,
    Placeholder,
    Turn,
    placeholders,
    resolved,
    value,
    with_values,
)
from stochastic_depth.surgery.edits import Site
from stochastic_depth.surgery.sample_places import samples
from stochastic_depth.torch_private import recomputation


def turns_of(found: list[Placeholder]) -> tuple[Turn, ...]:
    """The residual additions in whose branches the placeholders are, each once."""
    turns = found[0]._node.turns if found else ()
    for placeholder in found[1:]:
        if placeholder._node.turns is not turns:
            turns = tuple(dict.fromkeys((*turns, *placeholder._node.turns)))
    return turns


def addition_at(turns: tuple[Turn, ...], site: Site) -> Turn | None:
    """The turn whose residual addition stands at `site`, if one does."""
    return next((turn for turn in turns if site in turn.sites), None)


def adds_branch(turn: Turn, side: int, args: tuple[Any, ...]) -> bool:
    """Whether the operands are a shortcut, at position `side`, and the branch of `turn`."""
    if len(args) < 2 or not isinstance(args[side], Tensor):
        return False
    shortcut = args[side]
    others = [arg for n, arg in enumerate(args) if n != side]
    own = isinstance(shortcut, Placeholder) and turn in shortcut._node.turns
    return not own and any(turn in p._node.turns for p in placeholders(others))


def add(turn: Turn, side: int, func: Any, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The residual addition `func(*args, **kwargs)` under the gate of `turn`.

    Args:
        side: the position of the shortcut in `args`.
        name: of `func`; an addition in place changes the first operand.
    """
    turn.met += 1
    if turn.recomputed is not None:
        turn.recomputed += _checkpoints_around(turn)
    shortcut, target = args[side], args[0]
    changes = name in ("add_", "__iadd__", "addcmul_")
    if turn.gate.open:
        shortcut = resolved(shortcut)
        new = [shortcut if n == side else _scaled(turn, arg) for n, arg in enumerate(args)]
        if changes and isinstance(target, Placeholder):
            func = {"addcmul_": torch.addcmul}.get(name, torch.add)
        result = func(*new, **kwargs)
    elif changes and target is shortcut:
        return shortcut
    else:
        copies = turn.copies or changes
        result = shortcut.clone() if copies else shortcut
    if changes and isinstance(target, Placeholder):  # from now on it is this sum
        target._node = Node.finished(target._node.tape, (), resolved(result))
        target._leaf = -1
    return result


def _checkpoints_around(turn: Turn) -> Iterator[Callable[[], bool]]:
    """The checkpoints under way between the call of the owner and its addition.

    The owner's call is found as a frame of `deferring`, the forward method that `defer` makes,
    whose session has this turn.
    """
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "deferring":
            session = frame.f_locals.get("session")
            if session is not None and turn in session.turns.values():
                return
        found = recomputation(frame)
        if found is not None:
            yield found
        frame = frame.f_back


def _scaled(turn: Turn, operand: Any) -> Any:
    """The value of an operand, multiplied as the gate says if it is of the branch of `turn`."""
    if isinstance(operand, Placeholder):
        of_branch = turn in operand._node.turns
        operand = value(operand)
        return turn.gate.scale(operand) if of_branch else operand
    return operand


def chosen_values(
    args: Any, kwargs: Mapping[str, Any], turns: tuple[Turn, ...], site: Callable[[], Site]
) -> tuple[Any, Mapping[str, Any]]:
    """As `with_values`; under a gate for samples, with those samples of what comes in from outside.

    Args:
        site: says where in the code this is; called only under such a gate.
    """
    turn = next((turn for turn in turns if turn.gate.samples is not None), None)
    if turn is not None:
        args, kwargs = chosen(turn.owner, turn.gate, frozenset(turns), (args, kwargs), site())
    return with_values(args, kwargs)


def chosen(
    owner: nn.Module, gate: Gate, turns: frozenset[Turn], values: Any, place: Hashable
) -> Any:
    """`values` with the drawn samples of what comes in from outside of the branches of `turns`.

    Args:
        owner: the module whose code adds.
        place: where in the code this is.
    """
    if gate.samples is None:
        return values
    if isinstance(values, Placeholder):
        if not turns.isdisjoint(values._node.turns):
            return values
        return samples(owner, gate, value(values), place)
    kind = type(values)
    if kind is tuple or kind is list:
        parts = [chosen(owner, gate, turns, each, (place, n)) for n, each in enumerate(values)]
        changed = any(new is not old for new, old in zip(parts, values, strict=True))
        return kind(parts) if changed else values
    if kind is dict:
        return {k: chosen(owner, gate, turns, each, (place, k)) for k, each in values.items()}
    return samples(owner, gate, values, place)


def no_graph(turns: Sequence[Turn]) -> AbstractContextManager[Any]:
    """A context for the branches of `turns`: without a graph if all of them run forward only."""
    detached = bool(turns) and all(turn.gate.detached for turn in turns)
    return torch.no_grad() if detached else nullcontext()
