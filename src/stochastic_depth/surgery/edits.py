"""The edits that put a branch under a gate, and how their places are found in the source.

A `Place` is an expression in a method of a class; that method is rewritten there. A `Site` is an
expression in any function, as the interpreter's frames show it; a deferred addition is recognised
by its site while it runs.
"""

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Literal

from torch import nn

Side = Literal["left", "right"]
Position = tuple[int, int, int, int]
"""The first and last line of an expression in its file, then its first and last column."""


@dataclass(frozen=True)
class Place:
    """An expression in a method."""

    kind: type[nn.Module]
    """The class that defines the method: the class of the module, or a parent class."""
    method: str
    position: Position

    def __str__(self) -> str:
        return f"{self.kind.__qualname__}.{self.method}, line {self.position[0]}"


Parameter = tuple[int | None, str | None]
"""A parameter of a function: its position, if it has one, and its name, if that is known."""


@dataclass(frozen=True)
class Caller:
    """The call of one method in another."""

    place: Place
    dead: frozenset[str] = frozenset()
    """Variables of the calling method that were None, or not used after the addition. A closed
    branch does not compute them, and sets them to None."""


@dataclass(frozen=True)
class Sum:
    """An addition in a method. Closed, it is its shortcut, and nothing of its branch runs."""

    place: Place
    shortcut: Side
    within: Parameter | None = None
    """For a call of a function that adds: which of its parameters is the shortcut."""
    dead: frozenset[str] = frozenset()
    """As `Caller.dead`, for the method that adds."""
    callers: tuple[Caller, ...] = ()
    """The calls through which other methods of the module reach this one, the innermost first."""
    copies: bool = False
    """Whether a closed addition must copy its shortcut, because later code may overwrite the sum in
    place."""

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class Argument:
    """A call in a method that is passed a value of the branch. Closed, it is passed None.

    The addition is in the module or method that is called.
    """

    place: Place
    arguments: tuple[Parameter, ...]
    dead: frozenset[str] = frozenset()
    callers: tuple[Caller, ...] = ()


@dataclass(frozen=True)
class Registered:
    """A whole module whose forward method was registered with `sd.register_unit`."""

    forward: Callable[..., Any]


Site = tuple[str, str, int, Any]
"""An expression in the code: the file, the function, its first line, and the position inside it."""

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_"}
"""Names of the functions that add."""


def scales_second(name: str, others: Mapping[str, Any]) -> bool:
    """Whether an addition multiplies its second operand first, as `torch.add(x, y, alpha=2)`.

    Args:
        name: one of `ADDITIONS`; the result is False for other functions.
        others: the arguments that are no operands.
    """
    return name in ADDITIONS and (name.startswith("addcmul") or others.get("alpha", 1) != 1)


def by_position(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an addition, operands first, also of `torch.add(input=x, other=y)`."""
    others = dict(kwargs)
    first = (others.pop("input"),) if "input" in others else ()
    last = [others.pop(name) for name in ("other", "tensor1", "tensor2") if name in others]
    return (*first, *args, *last), others


@dataclass(frozen=True)
class Calls:
    """The calls of a module, during one call of the owner, that belong to a branch."""

    module: str
    """Its name, relative to the owner."""
    which: tuple[int, ...]
    """The numbers of those calls, from 0."""
    of: int
    """How many calls there are in all. If all belong to the branch, their number may change."""
    tensor: bool
    """Whether each of them returned a tensor, not a tuple or another structure."""

    @property
    def always(self) -> bool:
        """Whether all calls of the module belong to the branch."""
        return len(self.which) == self.of


@dataclass(frozen=True)
class Deferred:
    """One deferred residual addition: an edit of the module in which all of its branch runs."""

    block: str
    """The name of its block."""
    number: int
    """The number of this addition within its owner."""
    sites: tuple[tuple[Site, int], ...]
    """The expressions that make the addition, each with the position of the shortcut among the
    operands. There are two where training mode makes it in another expression than evaluation."""
    calls: tuple[Calls, ...]
    copies: bool
    """As `Sum.copies`."""

    def __str__(self) -> str:
        return f"the addition in {self.sites[0][0][1]}"


@dataclass(frozen=True)
class Entry:
    """The model itself. When it returns, all deferred calls that its outputs need are made."""


Sliced = Sum | Argument
Edit = Sum | Argument | Registered | Deferred | Entry


_POSITIONS: dict[int, tuple[CodeType, list[Any]]] = {}


def site_of(frame: FrameType) -> Site:
    """The expression that `frame` is evaluating.

    The number of the bytecode instruction does not identify it, because that changes when the
    interpreter specialises a call.
    """
    code = frame.f_code
    known = _POSITIONS.get(id(code))
    if known is None:
        known = _POSITIONS[id(code)] = code, list(code.co_positions())
    position = known[1][frame.f_lasti // 2]
    if None in position:
        position = frame.f_lasti
    return code.co_filename, code.co_qualname, code.co_firstlineno, position


@dataclass(frozen=True)
class Method:
    """A running method of a module."""

    place: Place | None
    """The expression that it is evaluating; None where its source is not known."""
    frame: FrameType
    called: FrameType | None
    """The frame of the function that this expression calls, if it is a call."""


def find_places(
    modules: Container[nn.Module], frame: FrameType | None
) -> Iterator[tuple[nn.Module, Place | None]]:
    """Which of `modules` have a running method around `frame`, and what each evaluates.

    The frames are walked once for all modules, because reading their variables is slow.
    """
    seen = set[nn.Module]()
    while frame is not None:
        code = frame.f_code
        held = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(held, nn.Module) and held in modules and held not in seen:
            seen.add(held)
            yield held, _in_method(held, code, frame.f_lasti // 2)
        frame = frame.f_back


def methods_of(module: nn.Module, frame: FrameType | None) -> Iterator[Method]:
    """The running methods of `module` around `frame`, the innermost first."""
    called = None
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            yield Method(_in_method(module, code, frame.f_lasti // 2), frame, called)
        called, frame = frame, frame.f_back


def _in_method(module: nn.Module, code: CodeType, instruction: int) -> Place | None:
    first, last, start, end = list(code.co_positions())[instruction]
    if first is None or last is None or start is None or end is None:
        return None
    for kind in type(module).__mro__:
        method = vars(kind).get(code.co_name)
        inner = inspect.unwrap(method) if callable(method) else None
        if kind is not nn.Module and getattr(inner, "__code__", None) is code:
            return Place(kind, code.co_name, (first, last, start, end))
    return None
