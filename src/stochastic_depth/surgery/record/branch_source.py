"""Locate a residual addition, and the beginning of its branch, in the source.

While an addition is being made, the methods that lead to it are running. Their frames show which
expressions to edit, and which variables need not be computed while the branch is closed.
"""

import itertools
from collections.abc import Container, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.surgery.edits import (
    AdditionEdit,
    ArgumentEdit,
    CallParameter,
    RewriteEdit,
)
from stochastic_depth.surgery.frames import CallSite, Method, SourceLocation, methods_of
from stochastic_depth.surgery.record.branches import AdditionEvent, Execution
from stochastic_depth.surgery.record.shortcuts import mixing
from stochastic_depth.surgery.record.trace import Call, Recording, calls_during
from stochastic_depth.surgery.rewrite.bypassed import not_reached
from stochastic_depth.surgery.rewrite.syntax import has_one_path
from stochastic_depth.tensors import Promotion, tensors_in

UPSAMPLES = ("interpolate", "upsample", "conv_transpose", "pixel_shuffle")
"""Parts of the names of functions that may make values larger."""

Edits = tuple[tuple[str, RewriteEdit | None], ...]
"""The modules to edit, by name, each with its edit; the module that adds is the first. The edit is
None if the expression is not in a method of the module."""


@dataclass(frozen=True)
class Addition:
    """A residual addition in the source, and how its branch was computed."""

    owner: str
    """Name of the module in which the branch begins: the one that adds, or one that calls it."""
    edits: Edits
    identity: bool
    """Whether the shortcut is the value that the branch was computed from, or a different part of
    that value; otherwise it is a projection."""
    begins_elsewhere: bool = False
    """Whether a part of the branch is computed before the owner is called."""
    modules: tuple[str, ...] = ()
    """Names of the modules inside the owner that the branch calls, one entry for each call."""
    parameters: frozenset[str] = frozenset()
    """Names of the parameters inside the owner that the branch uses."""
    events: tuple[AdditionEvent, ...] = ()
    """The executions of the addition in the recorded pass."""
    coupled: int | None = None
    """In a reversible network: the result of the addition to the other stream that makes this one
    residual."""
    upsamples: bool = False
    """Whether the branch resizes a value to a larger one."""
    is_last: bool = False
    """Whether no function with weights uses its result, as in an output of the model."""


def locate(recording: Recording, made: Execution, frame: FrameType) -> tuple[Addition, Execution]:
    """The addition that is executed, with the edits that make its branch skippable; and `made` with
    its branch.

    The search begins at the module that adds, and goes outwards through its callers to the one in
    whose call the branch begins.

    Args:
        frame: the frame of the expression that adds.
    """
    edits: list[tuple[str, RewriteEdit | None]] = []
    passed: tuple[CallParameter, ...] = ()
    call, branch = made.stack[-1], frozenset[int]()
    for call in reversed(made.stack):
        methods = list(methods_of(call.module, frame))
        edit = (
            _argument_edit(methods, passed)
            if edits
            else _addition_edit(recording, methods, made, frame)
        )
        edits.append((call.name, edit))
        branch = made.branch_within(recording, call)
        passed = _passed_arguments(recording, call, branch, made.shortcut)
        if not passed:
            break
    inside = calls_during(call.children, min(branch, default=made.total), made.total)
    modules = tuple(each.name for each in inside if each.outputs and each.outputs <= branch)
    addition = Addition(
        call.name,
        tuple(edits),
        made.identity,
        begins_elsewhere=bool(passed),
        modules=modules,
        parameters=recording.parameters(branch),
        upsamples=any(_is_upsampled(recording, value) for value in branch),
    )
    return addition, replace(made, branch_in_owner=branch, modules=frozenset(modules))


def _is_upsampled(recording: Recording, number: int) -> bool:
    """Whether a value was resized to a larger one."""
    value = recording.values[number]
    if not value.parents or not any(part in value.made_by for part in UPSAMPLES):
        return False
    before, after = recording.values[value.parents[0]].tensor.shape, value.tensor.shape
    return after[-1:] > before[-1:]


def _addition_edit(
    recording: Recording, methods: list[Method], made: Execution, frame: FrameType
) -> AdditionEdit | None:
    """The edit where the innermost of `methods` adds, or calls a function that adds.

    If such a function could do something else on other inputs, there is none.
    """
    location, callers = _locations(methods)
    function = methods[0].called if methods else None
    if location is None or function is None:
        return location and AdditionEdit(location, made.occurrence.side, callers=callers)
    inner = frame
    while has_one_path(inner.f_code) and inner is not function:
        inner = inner.f_back or function
    if not has_one_path(inner.f_code):
        return None
    code = function.f_code
    for n, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
        value = function.f_locals.get(name)
        if isinstance(value, Tensor) and recording.number(value) == made.shortcut:
            position = n if n < code.co_argcount else None
            return AdditionEdit(location, made.occurrence.side, (position, name), callers=callers)
    return None


def _argument_edit(methods: list[Method], passed: tuple[CallParameter, ...]) -> ArgumentEdit | None:
    """The edit where the innermost of `methods` passes a part of the branch to a module."""
    location, callers = _locations(methods)
    return location and ArgumentEdit(location, passed, callers=callers)


def _locations(methods: list[Method]) -> tuple[SourceLocation | None, tuple[SourceLocation, ...]]:
    """The expression that the innermost method evaluates, and the calls by which it is reached."""
    locations = [method.location for method in methods]
    known = [location for location in itertools.takewhile(bool, locations) if location]
    return (known[0] if known else None), tuple(known[1:])


def _passed_arguments(
    recording: Recording, call: Call, branch: Set[int], shortcut: int
) -> tuple[CallParameter, ...]:
    """The arguments of `call` that hold a part of the branch, computed before the call."""

    def is_of_branch(tensor: Tensor) -> bool:
        value = recording.number(tensor)
        if value not in branch or value >= call.began:
            return False
        made = recording.reach(value, shortcut)
        return shortcut in made and mixing(recording, made - {shortcut})

    positional = [((n, None), value) for n, value in enumerate(call.args)]
    named = [((None, name), value) for name, value in call.kwargs.items()]
    return tuple(
        parameter
        for parameter, value in [*positional, *named]
        if any(map(is_of_branch, tensors_in(value)))
    )


def as_sums(recording: Recording, edits: Edits, executions: Sequence[Execution]) -> Edits:
    """`edits`, in which a closed addition returns its shortcut in the form of the sum.

    That is a copy if the pass has overwritten one of the sums, and a tensor of their dtype.
    """
    form: dict[str, Any] = {
        "copies": any(recording.is_changed_later(each.total) for each in executions),
        "promotion": promotion(recording, executions),
    }
    return tuple(
        (name, replace(edit, **form) if isinstance(edit, AdditionEdit) else edit)
        for name, edit in edits
    )


def promotion(recording: Recording, executions: Iterable[Execution]) -> Promotion | None:
    """How the shortcuts of these additions get the dtype of their sums; None if they have it.

    It is None also if the sums have several dtypes; the proof compares the dtypes of the outputs.
    """
    values = recording.values
    pairs = [(values[each.shortcut].tensor, values[each.total].tensor) for each in executions]
    dtypes = {total.dtype for _, total in pairs}
    if len(dtypes) > 1 or all(shortcut.dtype == total.dtype for shortcut, total in pairs):
        return None
    name = str(dtypes.pop()).removeprefix("torch.")
    return Promotion(name, torch.is_autocast_enabled(pairs[0][1].device.type))


def with_not_shown(edits: Edits, reached: Container[CallSite]) -> Edits:
    """`edits`, with the additions alike that are not among those that the pass has `reached`."""
    return tuple(
        (name, replace(edit, not_shown=not_reached(edit, reached)))
        if isinstance(edit, AdditionEdit)
        else (name, edit)
        for name, edit in edits
    )
