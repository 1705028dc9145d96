"""Group the additions of deferred blocks, name the blocks, and make the edits that defer them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.blocks import repeated_block
from stochastic_depth.surgery.edits import BranchCalls, DeferredEdit
from stochastic_depth.surgery.record.branches import (
    MIN_SAVED,
    AdditionEvent,
    Analysis,
    Group,
    mostly_shared,
)
from stochastic_depth.surgery.record.trace import Call


def deferred_groups(
    events: Iterable[AdditionEvent], analysis: Analysis, modules: Mapping[str, nn.Module]
) -> list[Group]:
    """Group additions into blocks: by call of a module, or by iteration of a loop in it."""
    made_in: dict[int, list[AdditionEvent]] = {}
    for event in events:
        if event.enclosing is None:
            analysis.find_enclosing_call(event)
        assert event.enclosing is not None
        made_in.setdefault(event.enclosing.serial, []).append(event)
    blocks: dict[tuple[str, Any], list[AdditionEvent]] = {}
    for of_call in made_in.values():
        looped = max(Counter(event.site for event in of_call).values()) > 1
        iterations = analysis.iterations(of_call)
        for event in of_call:
            key = (
                _iteration(event, iterations, analysis)
                if looped
                else _call(event, analysis, modules)
            )
            blocks.setdefault(key, []).append(event)
    return [
        analysis.group(name, _outermost(group, analysis)) for (name, _), group in blocks.items()
    ]


def _outermost(events: Sequence[AdditionEvent], analysis: Analysis) -> list[AdditionEvent]:
    """The events that are not part of the branch of a different event.

    Events whose sums do not reach the outputs are dropped, unless there are no others. The last
    block, for example, may add to a second stream that nothing reads.
    """
    events = [e for e in events if e.total in analysis.alive] or events
    return [e for e in events if not any(e.total in analysis.exclusive_to(o) for o in events)]


def _call(
    event: AdditionEvent, analysis: Analysis, modules: Mapping[str, nn.Module]
) -> tuple[str, Any]:
    """The name of the block of an addition outside loops, and the iteration of its call.

    Calls that do not depend on each other have the same iteration.
    """
    assert event.enclosing is not None
    name = repeated_block(event.enclosing.name, modules)
    if not name:  # the model itself is not a block: each of its additions is one
        return ".".join(_module_path(event, analysis)), (event.site, event.occurrence)
    around = (event.enclosing, *event.enclosing.ancestors())
    call = next((call for call in around if call.name == name), event.enclosing)
    return name, analysis.iteration(call)


def _iteration(
    event: AdditionEvent, iterations: Mapping[AdditionEvent, int], analysis: Analysis
) -> tuple[str, Any]:
    """The name of the block of an addition in a loop over modules, and its iteration, if needed.

    The block is the outermost module, inside the one that loops, in which no expression adds twice;
    except to values that do not depend on each other, as in the two halves of a siamese network.

    Args:
        iterations: the iteration of each addition of the loop, see `Analysis.iterations`.
    """
    assert event.enclosing is not None
    paths = {other: _module_path(other, analysis, looped=True) for other in iterations}
    path = paths[event]
    for length in range(len(_path(event.enclosing.name)) + 1, len(path) + 1):
        prefix = path[:length]
        inside = [other for other in iterations if paths[other][:length] == prefix]
        added = {(other.site, *paths[other], iterations[other]) for other in inside}
        if len(added) == len({other.site for other in inside}):
            return ".".join(prefix), None
    return ".".join(path), iterations[event]


def _module_path(event: AdditionEvent, analysis: Analysis, looped: bool = False) -> list[str]:
    """The common prefix of the names of the branch's modules; or the name of the largest module.

    Modules that several branches call are left out, because they belong to none in particular.
    """
    assert event.enclosing is not None
    calls = analysis.group("", [event]).calls or (
        _returns_branch(event, analysis) if looped else ()
    )
    once = [call for call in calls if len(analysis.calls_of(call.name)) == 1]
    calls = once or calls or [event.enclosing]
    levels = zip(*(_path(call.name) for call in calls), strict=False)
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, levels)]
    if len(common) > len(_path(event.enclosing.name)):
        return common
    largest = max(calls, key=lambda call: sum(p.numel() for p in call.module.parameters()))
    return _path(largest.name)


def _path(name: str) -> list[str]:
    """The parts of a module's name; none for the model itself."""
    return name.split(".") if name else []


def _returns_branch(event: AdditionEvent, analysis: Analysis) -> tuple[Call, ...]:
    """The outermost call that returns the last value of a branch, or no call.

    One layer may compute the branches of several streams, so that no stream needs it exclusively.
    """
    assert event.enclosing is not None
    calls = [
        (max(outputs & event.branch), -call.serial, call)
        for call, outputs in analysis.recording.finished
        if call.is_within(event.enclosing) and outputs & event.branch
    ]
    return (max(calls, key=lambda each: each[:2])[2],) if calls else ()


def deferred_edits(group: Group, analysis: Analysis) -> list[DeferredEdit]:
    """The edits that give `group` its gates, one for each addition, numbered from 0.

    Raises:
        UnsupportedBlockError: when too little of the branch is exclusive to the addition.
    """
    if group.saved_share < MIN_SAVED:
        shared = group.exclusive_share < MIN_SAVED
        raise UnsupportedBlockError(
            mostly_shared(group.exclusive_share) if shared else _too_few_modules(group.saved_share)
        )
    return [
        DeferredEdit(
            group.block,
            number,
            ((event.site, event.side),),
            _calls_for(event, group, analysis),
            analysis.recording.is_overwritten(event.total),
        )
        for number, event in enumerate(group.events)
    ]


def _calls_for(event: AdditionEvent, group: Group, analysis: Analysis) -> tuple[BranchCalls, ...]:
    """The calls to leave out while the block is closed, by module.

    Raises:
        UnsupportedBlockError: when there are none.
    """
    by_module: dict[str, list[Call]] = {}
    for call in group.calls:
        if len(group.events) == 1 or _computes(call, event, analysis):
            by_module.setdefault(call.name, []).append(call)
    if not by_module:
        raise UnsupportedBlockError(_NO_MODULE)
    owner = group.owner
    calls = []
    for name, which in by_module.items():
        every = [call for call in analysis.calls_of(name) if call.is_within(owner)]
        ordinals = tuple(every.index(call) for call in which)
        inner = name[len(owner.name) + 1 :] if owner.name else name
        return_tensors = all(call.returned_tensor for call in which)
        calls.append(BranchCalls(inner, ordinals, len(every), return_tensors))
    return tuple(calls)


def _computes(call: Call, event: AdditionEvent, analysis: Analysis) -> bool:
    """Whether a call computes a part of the branch of `event`."""
    computed = range(call.began, call.ended)  # empty if it returns its input
    return not event.branch.isdisjoint([*computed, *analysis.outputs_of[call.serial]])


_NO_MODULE = "there is no module that only its branch needs"


def _too_few_modules(saved: float) -> str:
    """The reason not to defer a block whose modules compute too little of its branch.

    Args:
        saved: the share of the branch's FLOPs, from 0 to 1, that its modules compute.
    """
    if not saved:
        return _NO_MODULE
    return f"the modules that only its branch needs compute only about {saved:.0%} of its FLOPs"
