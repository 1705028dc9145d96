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
from stochastic_depth.surgery.find.deferred_groups import deferred_edits
from stochastic_depth.surgery.gated_class import gated_class
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis, Group
from stochastic_depth.surgery.rewrite.methods import skipped_when_closed


def edited_block(
    name: str, additions: list[Addition], modules: Mapping[str, nn.Module], analysis: Analysis
) -> FoundBlock:
    """The block of `additions` with edits of its modules, or with the reason why there are none."""
    module = modules[name]
    flops = analysis.flops(event for addition in additions for event in addition.events)
    if isinstance(module, Residual):
        return residual_block(name, module, flops)
    units: dict[Any, Unit] = {}
    refusal = ""
    for addition in additions:
        try:
            edits = edits_of(addition, modules)
        except UnsupportedBlockError as error:
            refusal = refusal or str(error)
            continue
        before = units.get(edits) or Unit(edits, ())
        units[edits] = replace(
            before,
            additions=before.additions + _addition_edits(addition, modules),
            modules=before.modules | frozenset(addition.modules),
        )
    return FoundBlock(
        name,
        module,
        ", ".join(dict.fromkeys("identity" if a.identity else "projection" for a in additions)),
        tuple(units.values()),
        functools.reduce(operator.or_, (Counter(a.modules) for a in additions)),
        tuple(sorted(frozenset[str]().union(*(a.parameters for a in additions)))),
        flops,
        refusal,
    )


def rewritten_unit(addition: Addition, modules: Mapping[str, nn.Module]) -> Unit:
    """A unit for one addition whose methods are rewritten.

    Raises:
        UnsupportedBlockError: when they cannot be rewritten.
    """
    edits = edits_of(addition, modules)
    return Unit(edits, _addition_edits(addition, modules), modules=frozenset(addition.modules))


def edits_of(
    addition: Addition, modules: Mapping[str, nn.Module]
) -> tuple[tuple[nn.Module, Edit], ...]:
    """The modules that get the gate of `addition`, each with its edit; the one that adds is first.

    Args:
        modules: all modules of the model, by name.

    Raises:
        UnsupportedBlockError: when its methods cannot be rewritten.
    """
    whole = registered_around(addition.owner, modules)
    if whole is not None:
        forward = registered(type(modules[whole]))
        assert forward is not None
        return ((modules[whole], RegisteredEdit(forward)),)
    return _rewrite_edits(addition, modules)


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
            of_module.append(ArgumentEdit(outer.location, unused, outer.dead))
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


def _addition_edits(
    addition: Addition, modules: Mapping[str, nn.Module]
) -> tuple[tuple[nn.Module, AdditionEdit], ...]:
    """The module that adds and the addition in its source, if that is known."""
    name, edit = addition.edits[0]
    return ((modules[name], edit),) if isinstance(edit, AdditionEdit) else ()


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
    reasons: Mapping[AdditionEvent, str],
) -> FoundBlock:
    """The deferred block of `group`; refused if too little of its branch is exclusive to it.

    Args:
        reasons: why the methods that make an addition could not be rewritten; empty if they can.
    """
    owner = modules[group.owner.name]
    units: tuple[Unit, ...] = ()
    refusal = ""
    try:
        units = tuple(
            Unit(((owner, edit),), (), (event,), frozenset(group.modules))
            for edit, event in zip(deferred_edits(group, analysis), group.events, strict=True)
        )
    except UnsupportedBlockError as error:
        before = next(filter(None, (reasons[event] for event in group.events)), "")
        refusal = f"{before}; nor can it be deferred: {error}" if before else str(error)
    shortcuts = dict.fromkeys("identity" if e.identity else "projection" for e in group.events)
    return FoundBlock(
        group.block,
        modules[group.block],
        ", ".join(shortcuts),
        units,
        group.modules,
        group.parameters,
        group.flops,
        refusal,
    )


def numbered(blocks: Iterable[FoundBlock]) -> list[FoundBlock]:
    """The blocks, with the deferred additions of each owner numbered from 0."""
    numbers: defaultdict[nn.Module, Iterator[int]] = defaultdict(itertools.count)

    def with_number(owner: nn.Module, edit: Edit) -> tuple[nn.Module, Edit]:
        if isinstance(edit, DeferredEdit):
            edit = replace(edit, number=next(numbers[owner]))
        return owner, edit

    return [
        replace(
            block,
            units=tuple(
                replace(unit, edits=tuple(with_number(*pair) for pair in unit.edits))
                for unit in block.units
            ),
        )
        for block in blocks
    ]
