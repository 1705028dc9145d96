"""Read from interpreter frames which expression is being evaluated.

A `SourceLocation` is an expression in a method of a class, where the method can be rewritten. A
`CallSite` is an expression in any function; a deferred addition is recognised by its call site
while it runs.
"""

import inspect
from collections.abc import Container, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from torch import nn

Position = tuple[int, int, int, int]
"""The first and last line of an expression in its file, then its first and last column."""
CallSite = tuple[str, str, int, Any]
"""An expression: its file and function, the first line of the function, and where it is there."""


@dataclass(frozen=True)
class SourceLocation:
    """An expression in a method."""

    cls: type[nn.Module]
    """The class that defines the method: that of the module, or one of its base classes."""
    method: str
    position: Position

    def __str__(self) -> str:
        return f"{self.cls.__qualname__}.{self.method}, line {self.position[0]}"


_POSITIONS: dict[int, tuple[CodeType, list[Any]]] = {}


def call_site_of(frame: FrameType) -> CallSite:
    """The expression that `frame` is evaluating.

    It is identified by its position, because the interpreter changes bytecode when it specialises
    a call.
    """
    code = frame.f_code
    position = _positions(code)[frame.f_lasti // 2]
    if None in position:
        position = frame.f_lasti
    return code.co_filename, code.co_qualname, code.co_firstlineno, position


def _positions(code: CodeType) -> list[Any]:
    """Where in the source each instruction comes from: lines and columns, each None if unknown."""
    known = _POSITIONS.get(id(code))
    if known is None:
        known = _POSITIONS[id(code)] = code, list(code.co_positions())
    return known[1]


@dataclass(frozen=True)
class Method:
    """A running method of a module."""

    location: SourceLocation | None
    """The expression that it is evaluating; None if its source is unknown."""
    called: FrameType | None
    """The frame of the function that this expression calls; None if it is not such a call."""


def locations_in(
    modules: Container[nn.Module], frame: FrameType | None
) -> Iterator[tuple[nn.Module, SourceLocation | None]]:
    """For each of `modules` with a running method around `frame`: the expression it evaluates.

    The frames are walked once for all modules, because reading their variables is slow.
    """
    seen = set[nn.Module]()
    while frame is not None:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and owner in modules and owner not in seen:
            seen.add(owner)
            yield owner, _in_method(owner, code, frame.f_lasti // 2)
        frame = frame.f_back


def methods_of(module: nn.Module, frame: FrameType | None) -> Iterator[Method]:
    """The running methods of `module` around `frame`, innermost first."""
    called = None
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and frame.f_locals.get(code.co_varnames[0]) is module:
            yield Method(_in_method(module, code, frame.f_lasti // 2), called)
        called, frame = frame, frame.f_back


def _in_method(module: nn.Module, code: CodeType, instruction: int) -> SourceLocation | None:
    first, last, start, end = _positions(code)[instruction]
    if first is None or last is None or start is None or end is None:
        return None
    for cls in type(module).__mro__:
        method = vars(cls).get(code.co_name)
        inner = inspect.unwrap(method) if callable(method) else None
        if cls is not nn.Module and getattr(inner, "__code__", None) is code:
            return SourceLocation(cls, code.co_name, (first, last, start, end))
    return None
