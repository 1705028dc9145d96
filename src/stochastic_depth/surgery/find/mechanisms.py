"""Choose the mechanism by which each residual block is made skippable: the first that fits.

A registered forward method is tried first, then rewriting the methods that add. A block for which
neither works is deferred.
"""

import functools
import inspect
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.adapters import registered
from stochastic_depth.surgery.blocks import FoundBlock, Unit, residual_block
from stochastic_depth.surgery.edits import (
    AdditionEdit,
    ArgumentEdit,
    DeferredEdit,
    Edit,
    RegisteredEdit,
    RewriteEdit,
)
from stochastic_depth.surgery.find.branch_parameters import BlockWithEvents
from stochastic_depth.surgery.find.deferred_groups import deferred_edits
from stochastic_depth.surgery.find.groups import Group
from stochastic_depth.surgery.gated_class import gated_class
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis
from stochastic_depth.surgery.record.trace import Call, Recording
from stochastic_depth.surgery.rewrite.methods import skipped_when_closed


def edited_block(
    name: str, additions: list[Addition], modules: Mapping[str, nn.Module], recording: Recording
) -> FoundBlock:
    """The block of `additions` with edits of its modules, or with the reason why there are none."""
    module = modules[name]
    branch = frozenset[int]().union(*(e.branch for addition in additions for e in addition.events))
    flops = sum(recording.values[value].flops for value in branch)  # once, if branches share it
    if isinstance(module, Residual):
        return residual_block(name, module, flops)
    units: dict[Any, Unit] = {}
    refusal = ""
    for addition in additions:
        try:
            unit = edited_unit(addition, modules)
        except UnsupportedBlockError as error:
            refusal = refusal or str(error)
            continue
        before = units.get(unit.edits) or Unit(unit.edits, ())
        units[unit.edits] = replace(
            before,
            additions=before.additions + unit.additions,
            modules=before.modules | unit.modules,
        )
    return FoundBlock(
        name=name,
        module=module,
        shortcut=", ".join(
            dict.fromkeys("identity" if a.identity else "projection" for a in additions)
        ),
        units=tuple(units.values()),
        modules=functools.reduce(operator.or_, (Counter(a.modules) for a in additions)),
        parameters=tuple(sorted(frozenset[str]().union(*(a.parameters for a in additions)))),
        flops=flops,
        refusal=refusal,
    )


def edited_unit(addition: Addition, modules: Mapping[str, nn.Module]) -> Unit:
    """A unit for one addition in a registered module, or whose methods are rewritten.

    Raises:
        UnsupportedBlockError: when they cannot be rewritten.
    """
    whole = registered_around(addition.owner, modules)
    if whole is None:
        edits = _rewrite_edits(addition, modules)
    else:
        forward = registered(type(modules[whole]))
        assert forward is not None
        edits = ((modules[whole], RegisteredEdit(forward)),)
    name, edit = addition.edits[0]
    known = ((modules[name], edit),) if isinstance(edit, AdditionEdit) else ()
    return Unit(edits, known, modules=frozenset(addition.modules))


def _rewrite_edits(
    addition: Addition, modules: Mapping[str, nn.Module]
) -> tuple[tuple[nn.Module, Edit], ...]:
    """The expressions at which methods are rewritten, from the addition to where its branch begins.

    Raises:
        UnsupportedBlockError: when a method cannot be rewritten, or nothing would be skipped.
    """
    if addition.begins_elsewhere:
        raise UnsupportedBlockError("its branch begins outside all modules of the model")
    edits: list[tuple[nn.Module, Edit]] = []
    skips = False
    for name, edit in addition.edits:
        if edit is None:
            raise UnsupportedBlockError(
                f"its addition is not in a method of {type(modules[name]).__name__}, but in a "
                "function that a method calls"
            )
        of_module: list[RewriteEdit] = [edit]
        calls, unused = skipped_when_closed(edit)
        skips |= calls
        for outer in edit.callers:  # they may compute the branch, and pass it on
            if not unused:
                break
            of_module.append(ArgumentEdit(outer, unused))
            calls, unused = skipped_when_closed(of_module[-1])
            skips |= calls
        gated_class(type(modules[name]), tuple(of_module), False, "")
        edits += [(modules[name], each) for each in of_module]
    if not skips:
        raise UnsupportedBlockError(
            f"{edits[0][1]}: all of its branch is needed for more than the addition"
        )
    return tuple(edits)


def registered_around(owner: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The nearest module, from `owner` outwards, of a registered class."""
    name = owner
    while name and registered(type(modules[name])) is None:
        name = name.rpartition(".")[0]
    return name or None


def clashes(found: FoundBlock, events: Sequence[AdditionEvent]) -> bool:
    """Whether rewriting the methods of `found` would change the call site of one of `events`."""
    for unit in found.units:
        for module, edit in unit.edits:
            if isinstance(edit, RewriteEdit):
                code = inspect.unwrap(vars(edit.location.cls)[edit.location.method]).__code__
                if any(
                    event.site[:2] == (code.co_filename, code.co_qualname)
                    and any(call.module is module for call in event.stack)
                    for event in events
                ):
                    return True
    return False


def deferred_block(
    group: Group,
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
    refusals: Mapping[AdditionEvent, str],
) -> FoundBlock:
    """The deferred block of `group`; refused if too little of its branch is exclusive to it.

    Args:
        refusals: why the methods that make an addition could not be rewritten; empty if they can.
    """
    owner = modules[group.owner.name]
    units: tuple[Unit, ...] = ()
    refusal = ""
    try:
        units = tuple(
            Unit(((owner, edit),), (), (event.occurrence,), frozenset(group.modules))
            for edit, event in zip(deferred_edits(group, analysis), group.events, strict=True)
        )
    except UnsupportedBlockError as error:
        before = next(filter(None, (refusals[event] for event in group.events)), "")
        refusal = f"{before}; nor can it be deferred: {error}" if before else str(error)
    shortcuts = dict.fromkeys("identity" if e.identity else "projection" for e in group.events)
    return FoundBlock(
        name=group.name,
        module=modules[group.name],
        shortcut=", ".join(shortcuts),
        units=units,
        modules=group.modules,
        parameters=group.parameters,
        flops=group.flops,
        refusal=refusal,
    )


def change_of_shortcut(events: Iterable[AdditionEvent], recording: Recording) -> str:
    """How a module in a branch changes the shortcut in place; empty if none does."""
    for event in events:
        for change in recording.changes(event.shortcut):
            around = [change.call, *change.call.ancestors()] if change.call else []
            inside = around[: around.index(event.enclosing)] if event.enclosing in around else []
            if any(call.name in event.modules for call in inside):
                return _in_place(inside[0], change.function)
    return ""


def _in_place(call: Call, function: str) -> str:
    """The reason why a block whose branch changes its shortcut cannot be closed, and the remedy."""
    flag = "give it inplace=False, or " if getattr(call.module, "inplace", False) else ""
    return (
        f"its branch changes its shortcut in place, in {call.name!r} "
        f"({type(call.module).__name__}, {function}), which a closed block does not run: {flag}"
        "write x + f(x.clone())"
    )


def numbered(pairs: Iterable[BlockWithEvents]) -> list[BlockWithEvents]:
    """The blocks, with the deferred additions of each owner numbered from 0."""
    numbers: defaultdict[nn.Module, Iterator[int]] = defaultdict(itertools.count)

    def with_number(owner: nn.Module, edit: Edit) -> tuple[nn.Module, Edit]:
        if isinstance(edit, DeferredEdit):
            edit = replace(edit, number=next(numbers[owner]))
        return owner, edit

    def with_numbers(unit: Unit) -> Unit:
        return replace(unit, edits=tuple(with_number(*pair) for pair in unit.edits))

    return [
        (replace(block, units=tuple(map(with_numbers, block.units))), events)
        for block, events in pairs
    ]
