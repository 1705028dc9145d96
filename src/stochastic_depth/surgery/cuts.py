"""What of a module is put under a gate, and where it stands in the source."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Literal

from torch import nn

Side = Literal["left", "right"]
Position = tuple[int, int, int, int]
"""First and last line of an expression in its file, first and last column."""


@dataclass(frozen=True)
class Place:
    """An expression in a method."""

    kind: type[nn.Module]
    """The class that defines the method: that of the module, or a parent."""
    method: str
    position: Position

    def __str__(self) -> str:
        return f"{self.kind.__qualname__}.{self.method}, line {self.position[0]}"


@dataclass(frozen=True)
class Sum:
    """An addition in a method: closed, it is its shortcut, and nothing of its branch runs."""

    place: Place
    shortcut: Side
    nothing: frozenset[tuple[Position, int]] = frozenset()
    """Calls in the method, and which of their outputs are None: a closed branch has them too."""
    callers: tuple[Place, ...] = ()
    """Where other methods of the module call this one, from the inside out."""

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class Argument:
    """A call in a method that is handed what a branch has computed: closed, it is handed None.

    The addition is in the module or method that is called.
    """

    place: Place
    arguments: tuple[tuple[int | None, str | None], ...]
    """The position of each, if it has one, and its name."""
    nothing: frozenset[tuple[Position, int]] = frozenset()
    callers: tuple[Place, ...] = ()


@dataclass(frozen=True)
class Opaque:
    """A whole module that returns its input plus a branch: closed, it returns its input."""


@dataclass(frozen=True)
class Registered:
    """A whole module with a forward method, written with a gate, from `sd.register_unit`."""

    forward: Callable[..., Any]


Sliced = Sum | Argument
Cut = Sum | Argument | Opaque | Registered


def find_place(module: nn.Module, frame: FrameType | None) -> Place | None:
    """The expression in a method of `module` that is being evaluated, seen from `frame`."""
    return next(_places(module, frame), None)


def find_callers(module: nn.Module, frame: FrameType | None) -> tuple[Place, ...]:
    """Where other methods of `module` call the one that `find_place` finds, from the inside out."""
    others = itertools.islice(_places(module, frame), 1, None)
    return tuple(itertools.takewhile(lambda place: place is not None, others))  # type: ignore[arg-type]


def _places(module: nn.Module, frame: FrameType | None) -> Iterator[Place | None]:
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            yield _in_method(module, code, frame.f_lasti // 2)
        frame = frame.f_back


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
