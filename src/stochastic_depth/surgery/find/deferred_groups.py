"""Group the additions of deferred blocks, name the blocks, and make the edits that defer them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.blocks import is_inside, repeated_block
from stochastic_depth.surgery.edits import BranchCalls, DeferredEdit
from stochastic_depth.surgery.find.groups import (
    MIN_SAVED,
    Group,
    group_of,
    mostly_shared,
    own_calls,
)
from stochastic_depth.surgery.find.residual_additions import outermost
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.surgery.record.branch_source import promotion
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis
from stochastic_depth.surgery.record.trace import Call, calls_during

Key = tuple[str, Any]
"""The name of a block, and the iteration of a loop or call if it is made in several."""


def deferred_groups(
    events: Iterable[AdditionEvent], analysis: Analysis, modules: Mapping[str, nn.Module]
) -> list[Group]:
    """Group additions into blocks: by call of a module, or by iteration of a loop in it."""
    made_in: dict[Call, list[AdditionEvent]] = {}
    for event in events:
        made_in.setdefault(event.enclosing, []).append(event)
    blocks: dict[Key, list[AdditionEvent]] = {}
    for of_call in made_in.values():
        looped = max(Counter(event.site for event in of_call).values()) > 1
        keys = (
            _keys_in_loop(of_call, analysis)
            if looped
            else [_key_in_call(event, analysis, modules) for event in of_call]
        )
        for event, key in zip(of_call, keys, strict=True):
            blocks.setdefault(key, []).append(event)
    return [
        group_of(name, outermost(members, analysis), analysis)
        for (name, _), members in blocks.items()
    ]


def _key_in_call(event: AdditionEvent, analysis: Analysis, modules: Mapping[str, nn.Module]) -> Key:
    """The name of the block of an addition outside loops, and the iteration of its call.

    Calls that do not depend on each other have the same iteration.
    """
    name = repeated_block(event.enclosing.name, modules)
    if not name:  # the model itself is not a block: each of its additions is one
        path = _module_path(event, own_calls(event, analysis), analysis)
        return ".".join(path), event.occurrence
    around = (event.enclosing, *event.enclosing.ancestors())
    call = next((call for call in around if call.name == name), event.enclosing)
    return name, analysis.iteration(call)


def _keys_in_loop(events: Sequence[AdditionEvent], analysis: Analysis) -> list[Key]:
    """For each addition in a loop over modules: the name of its block, and its iteration, if
    needed.

    The block is the outermost module, inside the one that loops, in which no expression adds twice;
    except to values that do not depend on each other, as in the two halves of a siamese network.
    """
    iterations = analysis.iterations(events)
    paths = [
        _module_path(event, own_calls(event, analysis) or _returns_branch(event), analysis)
        for event in events
    ]
    outer = len(_path(events[0].enclosing.name))
    around = [[tuple(path[:n]) for n in range(outer + 1, len(path) + 1)] for path in paths]
    sites: dict[tuple[str, ...], set[CallSite]] = {}
    added: dict[tuple[str, ...], set[object]] = {}
    for event, path, prefixes in zip(events, paths, around, strict=True):
        for prefix in prefixes:
            sites.setdefault(prefix, set()).add(event.site)
            added.setdefault(prefix, set()).add((event.site, *path, iterations[event]))
    keys: list[Key] = []
    for event, path, prefixes in zip(events, paths, around, strict=True):
        once = (prefix for prefix in prefixes if len(added[prefix]) == len(sites[prefix]))
        block = next(once, None)
        name, iteration = ".".join(block or path), None if block else iterations[event]
        if not is_inside(name, event.enclosing.name):  # other modules may use it in their loops
            loop = event.enclosing.name, analysis.iteration(event.enclosing)
            iteration = iteration, loop
        keys.append((name, iteration))
    return keys


def _module_path(event: AdditionEvent, calls: Sequence[Call], analysis: Analysis) -> list[str]:
    """The common prefix of the names of the modules that are called for a branch; or the name of
    the largest one.

    Modules that several branches call are left out, because they belong to none in particular.
    """
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


def _returns_branch(event: AdditionEvent) -> list[Call]:
    """The outermost call that returns the last value of a branch, or no call.

    One layer may compute the branches of several streams, so that no stream needs it exclusively.
    """
    inside = calls_during(event.enclosing.children, min(event.branch), event.total)
    calls = [call for call in inside if call.outputs & event.branch]
    last = max(calls, key=lambda c: (max(c.outputs & event.branch), -c.serial), default=None)
    return [] if last is None else [last]


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
    if _is_compiled(group, analysis):
        raise UnsupportedBlockError(COMPILED)
    return [
        DeferredEdit(
            group.name,
            number,
            ((event.site, event.occurrence.side),),
            _calls_for(event, group, analysis),
            analysis.recording.is_changed_later(event.total),
            promotion(analysis.recording, [event]),
        )
        for number, event in enumerate(group.events)
    ]


COMPILED = (
    "a function that torch.compile compiles makes its addition, calls a module of its branch or "
    "computes with a value of its branch, and a gate does not reach into compiled code: leave that "
    "function uncompiled, and call sd.compile_blocks(model) after sd.apply; or, if it only "
    "computes, call it in the forward method of a module of the branch"
)


def _is_compiled(group: Group, analysis: Analysis) -> bool:
    """Whether compiled code makes an addition, calls a module that would be deferred, or computes
    with the results of such modules."""
    made = [call for event in group.events for call in event.stack]
    calls = [each for call in group.calls for each in (call, *call.ancestors())]
    inside = [call for call in [*made, *calls] if call.is_within(group.owner)]
    values = analysis.recording.values
    between = [
        values[number]
        for event in group.events
        for number in event.branch
        if not any(call.began <= number < call.ended for call in group.calls)
    ]
    return any(each.compiled for each in [*group.events, *inside, *between])


def _calls_for(event: AdditionEvent, group: Group, analysis: Analysis) -> tuple[BranchCalls, ...]:
    """The calls to leave out while the block is closed, by module.

    Raises:
        UnsupportedBlockError: when there are none.
    """
    branch = event.branch | _shared_with_others(event, group, analysis)
    by_module: dict[str, list[Call]] = {}
    for call in group.calls:
        if len(group.events) == 1 or _computes(call, branch):
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


def _shared_with_others(event: AdditionEvent, group: Group, analysis: Analysis) -> set[int]:
    """The values from which the branch of `event` and an earlier one of its group are computed.

    They are not in `event.branch`, because the shortcut, which is the earlier sum, needs them too:
    in `x + attention(h) + mlp(h)`, these are h and what computes it.
    """
    values = analysis.recording.values
    first = min(call.began for call in group.calls)
    totals = {each.total for each in group.events}
    seen, ahead = set[int](), list(event.branch)
    while ahead:
        for parent in values[ahead.pop()].parents:
            if parent >= first and parent not in seen and parent not in totals:
                seen.add(parent)
                ahead.append(parent)
    return seen


def _computes(call: Call, branch: Set[int]) -> bool:
    """Whether a call computes a part of a branch."""
    computed = range(call.began, call.ended)  # empty if it returns its input
    return not branch.isdisjoint([*computed, *call.outputs])


_AS_MODULE = "compute the branch in the forward method of a module of its own"
_NO_MODULE = f"there is no module that only its branch needs: {_AS_MODULE}"


def _too_few_modules(saved: float) -> str:
    """The reason not to defer a block whose modules compute too little of its branch.

    Args:
        saved: the share of the branch's FLOPs, from 0 to 1, that its modules compute.
    """
    if not saved:
        return _NO_MODULE
    return (
        f"the modules that only its branch needs compute only about {saved:.0%} of its FLOPs: "
        f"{_AS_MODULE}"
    )
