"""What is edited in a module to put a branch under a gate, and how it is found in the source.

A `Place` is an expression in a method of a class, where that method is rewritten. A `Site` is an
expression in any function, as the interpreter's frames give it; by it a deferred addition is
recognised while it runs.
"""

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
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


Parameter = tuple[int | None, str | None]
"""A parameter of a function: its position, if it has one, and its name, if it is known."""


@dataclass(frozen=True)
class Caller:
    """A call in a method."""

    place: Place
    dead: frozenset[str] = frozenset()
    """Variables of the method that were None or not used later: a closed branch, which does not
    compute them, sets them to None."""


@dataclass(frozen=True)
class Sum:
    """An addition in a method: closed, it is its shortcut, and nothing of its branch runs."""

    place: Place
    shortcut: Side
    within: Parameter | None = None
    """Where a function that is called there adds: which of its parameters is the shortcut."""
    dead: frozenset[str] = frozenset()
    """As `Caller.dead`."""
    callers: tuple[Caller, ...] = ()
    """Where other methods of the module call this one, from the inside out."""

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class Argument:
    """A call in a method that is handed what a branch has computed: closed, it is handed None.

    The addition is in the module or method that is called.
    """

    place: Place
    arguments: tuple[Parameter, ...]
    dead: frozenset[str] = frozenset()
    callers: tuple[Caller, ...] = ()


@dataclass(frozen=True)
class Opaque:
    """A whole module that returns its input plus a branch; closed, it returns its input."""


@dataclass(frozen=True)
class Registered:
    """A whole module with a forward method, written with a gate, from `sd.register_unit`."""

    forward: Callable[..., Any]


Site = tuple[str, str, int, Any]
"""An expression in the code: file, function, the line in which that begins, and its position."""

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_"}
"""Names of functions that add."""


def by_position(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of an addition with both operands first: `torch.add(input=x, other=y)` too."""
    others = dict(kwargs)
    first = (others.pop("input"),) if "input" in others else ()
    last = (others.pop("other"),) if "other" in others else ()
    return (*first, *args, *last), others


@dataclass(frozen=True)
class Calls:
    """Which calls of a module, within one call of the owner, belong to a branch."""

    module: str
    """Its name, in the owner."""
    which: tuple[int, ...]
    """Numbers of those calls, from 0."""
    of: int
    """How many calls there are; if all belong to the branch, their number may change."""
    tensor: bool
    """Whether each returned a tensor, not a tuple or another structure."""

    @property
    def always(self) -> bool:
        """Whether all calls of the module belong to the branch."""
        return len(self.which) == self.of


@dataclass(frozen=True)
class Deferred:
    """One residual addition whose branch is deferred, in the module in which all of it runs."""

    block: str
    number: int
    """Numbers the additions of one owner."""
    sites: tuple[tuple[Site, int], ...]
    """Where the addition stands, and which argument of it is the shortcut; in training mode it may
    stand elsewhere than in evaluation."""
    calls: tuple[Calls, ...]
    copies: bool
    """Whether something later may overwrite the shortcut."""

    def __str__(self) -> str:
        return f"the addition in {self.sites[0][0][1]}"


@dataclass(frozen=True)
class Entry:
    """The model itself: all deferred outputs are computed when it returns."""


Sliced = Sum | Argument
Edit = Sum | Argument | Opaque | Registered | Deferred | Entry


_POSITIONS: dict[int, tuple[CodeType, list[Any]]] = {}


def site_of(frame: FrameType) -> Site:
    """The expression that `frame` is evaluating.

    The number of the instruction is not enough: it changes when the interpreter specialises a call.
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
    """The expression that is being evaluated; None where its source is not known."""
    frame: FrameType
    called: FrameType | None
    """The frame of the function that the expression calls, if it is a call."""


def find_places(
    modules: Container[nn.Module], frame: FrameType | None
) -> Iterator[tuple[nn.Module, Place | None]]:
    """Which of `modules` are running around `frame`, and the expression each is evaluating.

    The frames are walked once for all modules, because their variables take a while to read.
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
    """The running methods of `module` around `frame`, from the inside out."""
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
