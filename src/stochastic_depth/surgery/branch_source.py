"""Where in the source a residual addition stands, and where its branch begins.

While an addition is being made, the methods that lead to it are running. Their frames show which
expressions have to be edited, and which variables a closed branch need not compute.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType

from torch import Tensor

from stochastic_depth.surgery.branches import Event
from stochastic_depth.surgery.edits import (
    Argument,
    Caller,
    Method,
    Parameter,
    Place,
    Side,
    Sliced,
    Sum,
    methods_of,
)
from stochastic_depth.surgery.trace import Call, Recording
from stochastic_depth.tensors import tensors_in

UPSAMPLES = ("interpolate", "upsample", "conv_transpose", "pixel_shuffle")
"""Parts of the names of functions that may make values larger."""

Edits = tuple[tuple[str, Sliced | None], ...]
"""The modules to edit, by name, with the place of the edit; the module that adds comes first. The
place is None where the expression is not in a method of the module."""


@dataclass(frozen=True)
class Addition:
    """A residual addition in the source, and how its branch was computed."""

    owner: str
    """Name of the module in which the branch begins: the module that adds, or one that calls it."""
    edits: Edits
    identity: bool
    """Whether the shortcut is not a projection: it is the value that the branch was computed from,
    or another part of that value."""
    begins_elsewhere: bool = False
    """Whether even the owner does not compute all of the branch."""
    modules: tuple[str, ...] = ()
    """Names of the modules inside the owner that ran for the branch, one entry for each call."""
    parameters: frozenset[str] = frozenset()
    """Names of the parameters inside the owner that the branch uses."""
    events: tuple[Event, ...] = ()
    """One event for each time that the addition was made in the recorded pass."""
    coupled: Event | None = None
    """In reversible networks: the addition to the other stream, because of which this one is
    residual."""
    upsamples: bool = False
    """Whether some value of the branch is resized to a larger one."""
    is_last: bool = False
    """Whether no function with weights uses its result: it is an output of the model, or nearly."""


@dataclass(frozen=True)
class Snapshot:
    """The variables of the running methods during an addition, for each module to be edited."""

    total: int
    """The result of the addition."""
    variables: tuple[tuple[dict[str, int | None], ...], ...]
    """Module by module, method by method: the variables that are None, and those whose value only
    the branch has used so far, with the number of the value."""


@dataclass(frozen=True)
class Located:
    """One execution of a residual addition, and where it was made."""

    addition: Addition
    branch: set[int]
    snapshot: Snapshot


def locate(
    recording: Recording, event: Event, frame: FrameType, mixes: Callable[[set[int]], list[str]]
) -> Located:
    """Find what has to be edited so that the branch of `event` can be skipped.

    The search begins at the module that adds, and goes outwards through its callers to the one
    during whose call the branch begins.

    Args:
        frame: the frame of the expression that adds.
        mixes: returns the functions that mix, among those that computed the given values.
    """
    edits: list[tuple[str, Sliced | None]] = []
    frames: list[list[FrameType]] = []
    handed: tuple[Parameter, ...] = ()
    branch: set[int] = set()
    call = event.stack[-1]
    for call in reversed(event.stack):
        methods = list(methods_of(call.module, frame))
        frames.append([method.frame for method in methods])
        edit = _argument(methods, handed) if edits else _sum(recording, methods, event)
        edits.append((call.name, edit))
        branch = event.branch_within(recording, call)
        handed = _handed(recording, call, branch, event.shortcut, mixes)
        if not handed:
            break
    modules = recording.modules(branch, call.began)
    event.modules = frozenset(modules)
    addition = Addition(
        call.name,
        tuple(edits),
        event.identity,
        begins_elsewhere=bool(handed),
        modules=modules,
        parameters=recording.parameters(branch),
        events=(event,),
        upsamples=any(_is_upsampled(recording, value) for value in branch),
    )
    return Located(addition, branch, _snapshot(recording, event.total, frames, branch))


def _is_upsampled(recording: Recording, number: int) -> bool:
    """Whether a value was resized to a larger one."""
    value = recording.values[number]
    if not value.parents or not any(part in value.made_by for part in UPSAMPLES):
        return False
    before, after = recording.values[value.parents[0]].tensor.shape, value.tensor.shape
    return after[-1:] > before[-1:]


def _sum(recording: Recording, methods: list[Method], event: Event) -> Sum | None:
    """The place where the innermost of `methods` adds, or calls a function that adds."""
    side: Side = "left" if event.side == 0 else "right"
    place, callers = _places(methods)
    function = methods[0].called if methods else None
    if place is None or function is None:
        return place and Sum(place, side, callers=callers)
    code = function.f_code
    for n, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        value = function.f_locals.get(name)
        if isinstance(value, Tensor) and recording.number(value) == event.shortcut:
            position = n if n < code.co_argcount else None
            return Sum(place, side, (position, name), callers=callers)
    return None


def _argument(methods: list[Method], handed: tuple[Parameter, ...]) -> Argument | None:
    """The place where the innermost of `methods` passes a part of the branch to a module."""
    place, callers = _places(methods)
    return place and Argument(place, handed, callers=callers)


def _places(methods: list[Method]) -> tuple[Place | None, tuple[Caller, ...]]:
    """The expression that the innermost method evaluates, and those at which the others call it."""
    places = [method.place for method in methods]
    known = list(itertools.takewhile(lambda place: place is not None, places))
    return (known[0] if known else None), tuple(Caller(place) for place in known[1:] if place)


def _handed(
    recording: Recording,
    call: Call,
    branch: set[int],
    shortcut: int,
    mixes: Callable[[set[int]], list[str]],
) -> tuple[Parameter, ...]:
    """The arguments of `call` that hold a part of the branch, computed before the call."""

    def is_of_branch(tensor: Tensor) -> bool:
        value = recording.number(tensor)
        if value not in branch or value >= call.began:
            return False
        made = recording.reach(value, shortcut)
        return shortcut in made and bool(mixes(made - recording.reach(shortcut, shortcut)))

    positional = [((n, None), value) for n, value in enumerate(call.args)]
    named = [((None, name), value) for name, value in call.kwargs.items()]
    return tuple(
        parameter
        for parameter, value in [*positional, *named]
        if any(map(is_of_branch, tensors_in(value)))
    )


def _snapshot(
    recording: Recording, total: int, frames: Sequence[Sequence[FrameType]], branch: set[int]
) -> Snapshot:
    """The variables that a closed branch may leave out: None, or used by the branch alone so far.

    Args:
        frames: the frames of the running methods, module by module.
    """

    def candidates(frame: FrameType) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        for name, value in frame.f_locals.items():
            if value is None:
                found[name] = None
            elif isinstance(value, Tensor):
                number = recording.number(value)
                if branch.issuperset(recording.values[number].children):
                    found[name] = number
        return found

    return Snapshot(total, tuple(tuple(map(candidates, methods)) for methods in frames))


def with_what_follows(
    recording: Recording, edits: Edits, snapshots: Sequence[Snapshot], outputs: set[int]
) -> Edits:
    """`edits`, with what only the code after the addition tells.

    That is whether it overwrites the sum, and the variables that were dead every time that the
    addition was made: a variable is dead if it is None, or if its value is not used later.

    Args:
        outputs: the numbers of the values that the model returned.
    """

    def is_dead(number: int | None, total: int) -> bool:
        if number is None:
            return True
        used_later = any(child > total for child in recording.values[number].children)
        return not used_later and number not in outputs

    def dead(module: int, method: int) -> frozenset[str]:
        names = [
            {
                name
                for name, number in s.variables[module][method].items()
                if is_dead(number, s.total)
            }
            for s in snapshots
            if method < len(s.variables[module])
        ]
        return frozenset(set.intersection(*names)) if len(names) == len(snapshots) else frozenset()

    def completed(module: int, edit: Sliced | None) -> Sliced | None:
        if edit is None:
            return None
        callers = tuple(Caller(c.place, dead(module, n)) for n, c in enumerate(edit.callers, 1))
        edit = replace(edit, dead=dead(module, 0), callers=callers)
        return replace(edit, copies=copies) if isinstance(edit, Sum) else edit

    copies = any(recording.is_overwritten(snapshot.total) for snapshot in snapshots)

    return tuple((name, completed(n, edit)) for n, (name, edit) in enumerate(edits))
