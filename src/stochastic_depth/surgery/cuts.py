"""What of a module is put under a gate, and where it stands in the source."""

import inspect
from collections.abc import Callable
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


@dataclass(frozen=True)
class Argument:
    """A call in a method that is handed what a branch has computed: closed, it is handed None.

    The addition is in the module that is called.
    """

    place: Place
    arguments: tuple[int | str, ...]
    """Positions or names."""
    nothing: frozenset[tuple[Position, int]] = frozenset()


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
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            return _in_method(module, code, frame.f_lasti // 2)
        frame = frame.f_back
    return None


def _in_method(module: nn.Module, code: CodeType, instruction: int) -> Place | None:
    first, last, start, end = list(code.co_positions())[instruction]
    if first is None or last is None or start is None or end is None:
        return None
    for kind in type(module).__mro__:
        method = vars(kind).get(code.co_name)
        inner = inspect.unwrap(method) if callable(method) else None
        if getattr(inner, "__code__", None) is code:
            return Place(kind, code.co_name, (first, last, start, end))
    return None
