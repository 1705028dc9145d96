"""The edits that put a branch under a gate, and how to find their locations in the source.

A `SourceLocation` is an expression in a method of a class, where the method can be rewritten. A
`CallSite` is an expression in any function, as an interpreter frame shows it; a deferred addition
is recognised by its call site while it runs.
"""

import inspect
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, Literal

from torch import nn

Side = Literal[0, 1]
"""Which of the two operands of an addition is its shortcut."""
Position = tuple[int, int, int, int]
"""The first and last line of an expression in its file, then its first and last column."""

NOT_REACHED = (
    "the residual addition of this block did not run in this pass: the model took a different path "
    "than on the example, and nothing on that path is skipped. Give sd.apply an example that takes "
    "it"
)
"""The message for a pass that bypasses the addition of a block."""


@dataclass(frozen=True)
class SourceLocation:
    """An expression in a method."""

    cls: type[nn.Module]
    """The class that defines the method: that of the module, or one of its base classes."""
    method: str
    position: Position

    def __str__(self) -> str:
        return f"{self.cls.__qualname__}.{self.method}, line {self.position[0]}"


CallParameter = tuple[int | None, str | None]
"""A parameter of a function: its position, or None; and its name, or None if that is unknown."""


@dataclass(frozen=True)
class Caller:
    """A call of one method of a module by a different one of its methods."""

    location: SourceLocation
    dead: frozenset[str] = frozenset()
    """Variables of the calling method that are None, or unused, after the addition. Under a closed
    gate they are not computed, but set to None."""


@dataclass(frozen=True)
class AdditionEdit:
    """An addition in a method.

    With a closed gate the addition returns its shortcut, and no code of its branch runs.
    """

    location: SourceLocation
    side: Side
    within: CallParameter | None = None
    """If the method calls a function that adds: which parameter of it is the shortcut."""
    dead: frozenset[str] = frozenset()
    """As `Caller.dead`, for the method that adds."""
    callers: tuple[Caller, ...] = ()
    """The calls by which other methods of the module reach this one, innermost first."""
    copies: bool = False
    """Whether to return a copy of the shortcut, because later code may change the sum in place."""

    def __str__(self) -> str:
        return str(self.location)


@dataclass(frozen=True)
class ArgumentEdit:
    """A call, in a method, that passes a value of the branch to the module or method that adds.

    With a closed gate the call receives None.
    """

    location: SourceLocation
    arguments: tuple[CallParameter, ...]
    dead: frozenset[str] = frozenset()
    callers: tuple[Caller, ...] = ()


@dataclass(frozen=True)
class RegisteredEdit:
    """A whole module whose forward method was registered with `sd.register_unit`."""

    forward: Callable[..., Any]


CallSite = tuple[str, str, int, Any]
"""An expression: its file and function, the first line of the function, and where it is there."""

ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__", "addcmul", "addcmul_"}
"""Names of PyTorch's functions that add."""


def scales_second(name: str, others: Mapping[str, Any]) -> bool:
    """Whether an addition scales its second operand, as `torch.add(x, y, alpha=2)` does.

    Args:
        name: the name of the function; the result is False if it is not one of `ADDITIONS`.
        others: the arguments other than the operands.
    """
    return name in ADDITIONS and (name.startswith("addcmul") or others.get("alpha", 1) != 1)


def by_position(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The operands of an addition, also if given by name; and its other arguments."""
    others = dict(kwargs)
    first = (others.pop("input"),) if "input" in others else ()
    last = [others.pop(name) for name in ("other", "tensor1", "tensor2") if name in others]
    return (*first, *args, *last), others


@dataclass(frozen=True)
class BranchCalls:
    """The calls of one module that belong to a branch, during one call of the owner."""

    module: str
    """The name of the module, relative to the owner."""
    indices: tuple[int, ...]
    """Which of the module's calls belong to the branch, counted from 0."""
    count: int
    """How often the module is called in all. If all calls belong to the branch, a later pass may
    make more or fewer."""
    return_tensors: bool
    """Whether each of them returned a tensor, rather than a tuple or another structure."""

    @property
    def always(self) -> bool:
        """Whether all calls of the module belong to the branch."""
        return len(self.indices) == self.count


@dataclass(frozen=True)
class DeferredEdit:
    """A deferred residual addition, as an edit of the module in which all of its branch runs."""

    block: str
    """The name of its block."""
    number: int
    """The number of this addition among those of its owner."""
    sites: tuple[tuple[CallSite, Side], ...]
    """The expressions that make the addition, each with its shortcut's side. There are two if
    training mode and evaluation use different expressions."""
    calls: tuple[BranchCalls, ...]
    copies: bool
    """As `AdditionEdit.copies`."""

    def __str__(self) -> str:
        return f"the addition in {self.sites[0][0][1]}"


@dataclass(frozen=True)
class EntryEdit:
    """The model itself, which makes the deferred calls that its outputs need before it returns."""


RewriteEdit = AdditionEdit | ArgumentEdit
Edit = AdditionEdit | ArgumentEdit | RegisteredEdit | DeferredEdit | EntryEdit


_POSITIONS: dict[int, tuple[CodeType, list[Any]]] = {}


def call_site_of(frame: FrameType) -> CallSite:
    """The expression that `frame` is evaluating.

    It is identified by its position, because the interpreter changes bytecode when it specialises
    a call.
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

    location: SourceLocation | None
    """The expression that it is evaluating; None if its source is unknown."""
    frame: FrameType
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
            yield Method(_in_method(module, code, frame.f_lasti // 2), frame, called)
        called, frame = frame, frame.f_back


def _in_method(module: nn.Module, code: CodeType, instruction: int) -> SourceLocation | None:
    first, last, start, end = list(code.co_positions())[instruction]
    if first is None or last is None or start is None or end is None:
        return None
    for cls in type(module).__mro__:
        method = vars(cls).get(code.co_name)
        inner = inspect.unwrap(method) if callable(method) else None
        if cls is not nn.Module and getattr(inner, "__code__", None) is code:
            return SourceLocation(cls, code.co_name, (first, last, start, end))
    return None
