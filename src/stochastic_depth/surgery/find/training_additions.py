"""Residual additions that a model makes in training mode only.

A block may use different expressions for its addition in training mode and in evaluation, for
example under `if self.training:`. Its one gate must close both. Other blocks run in training mode
only, for example those of an auxiliary head.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stochastic_depth.errors import StochasticDepthError, UnsupportedBlockError
from stochastic_depth.surgery.blocks import FoundBlock, Unit
from stochastic_depth.surgery.droppath import disable_drop_paths
from stochastic_depth.surgery.edits import DeferredEdit
from stochastic_depth.surgery.example import preserve_state
from stochastic_depth.surgery.find.deferred_groups import deferred_edits, deferred_groups
from stochastic_depth.surgery.record.additions import discover
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis, Group
from stochastic_depth.surgery.record.rejected import Rejected

Rewrite = Callable[[Addition], Unit]
"""Rewrites the methods that make an addition, or raises `UnsupportedBlockError`."""


@dataclass(frozen=True)
class InTraining:
    """The results of a recorded pass in training mode."""

    additions: list[Addition]
    """All residual additions of the pass in training mode."""
    new: tuple[AdditionEvent, ...]
    """The events that do not happen in evaluation."""
    counterparts: Mapping[AdditionEvent, AdditionEvent]
    """For each event of evaluation, the same event in training mode."""
    analysis: Analysis
    rejected: list[Rejected]


def added_in_training(
    model: nn.Module,
    run: Callable[[], Any],
    found: Sequence[FoundBlock],
    additions: Sequence[Addition],
    analysis: Analysis,
    count_flops: bool,
) -> InTraining | None:
    """Record a pass in training mode; returns None if it cannot differ from evaluation.

    It differs if training mode makes more additions. It may also differ if evaluation does not use
    everything that a module of a deferred branch returns, because a loss may use the rest.

    Args:
        additions: the additions of evaluation; `analysis` belongs to the same pass.
    """
    changed_settings = disable_drop_paths(model, found)
    try:
        with preserve_state(model), torch.enable_grad():
            model.train()
            now, analysis_now, rejected = discover(
                model, run, count_flops=count_flops, gradients=True
            )
    except StochasticDepthError:  # the model cannot train on the example
        return None
    finally:
        for setting in changed_settings:
            setting.restore()
    adds_more = not analysis_now.sites <= analysis.sites or analysis_now.functions
    if not adds_more and not any(_gives_more(block, analysis) for block in found):
        return None
    new, counterparts = _matched(additions, analysis, now, analysis_now)
    return InTraining(now, tuple(new), counterparts, analysis_now, rejected)


def _gives_more(block: FoundBlock, analysis: Analysis) -> bool:
    """Whether a module of a deferred branch returns a value that nothing is computed from."""
    values = analysis.recording.values
    return block.is_deferred and any(
        all(c < call.ended or c not in analysis.alive for c in values[value].children)
        for name in block.modules
        for call in analysis.calls_of(name)
        for value in analysis.outputs_of[call.serial]
    )


def _matched(
    before: Sequence[Addition],
    analysis_before: Analysis,
    now: Sequence[Addition],
    analysis_now: Analysis,
) -> tuple[list[AdditionEvent], dict[AdditionEvent, AdditionEvent]]:
    """Match the events of the two passes.

    Two events are the same if the same expression makes them in the same module, and their branches
    share a parameter, or call the same modules.

    Returns:
        The events of `now` that are not in `before`; and for each event of `before` that is in
        `now`, its counterpart.
    """
    left: dict[object, list[tuple[AdditionEvent, frozenset[str]]]] = {}
    for event in (event for addition in before for event in addition.events):
        left.setdefault(_expression(event), []).append((event, _runs(event, analysis_before)))
    known = {key: [runs for _, runs in each] for key, each in left.items()}
    new: list[AdditionEvent] = []
    counterparts: dict[AdditionEvent, AdditionEvent] = {}
    for event in (event for addition in now for event in addition.events):
        key, runs = _expression(event), _runs(event, analysis_now)
        if not _is_known(runs, known.get(key, ())):
            new.append(event)
            continue
        same = (n for n, (_, its) in enumerate(left[key]) if _is_known(runs, [its]))
        if (n := next(same, None)) is not None:
            counterparts[left[key].pop(n)[0]] = event
    return new, counterparts


def _expression(event: AdditionEvent) -> object:
    """A key for the expression and the module that make an addition."""
    return event.site, event.stack[-1].name


def _runs(event: AdditionEvent, analysis: Analysis) -> frozenset[str]:
    """Names of the parameters that its branch uses; if it uses none, names of its modules."""
    if event.enclosing is None:
        analysis.find_enclosing_call(event)
    parameters = analysis.parameters(event.branch)
    return frozenset(parameters or analysis.group("", [event]).modules)


def _is_known(runs: frozenset[str], known: Iterable[frozenset[str]]) -> bool:
    """Whether a branch is one of those that the same expression adds in evaluation."""
    return any(runs == before or not runs.isdisjoint(before) for before in known)


def with_training_additions(
    found: Sequence[FoundBlock],
    additions: Sequence[tuple[str, Addition]],
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
    rewrite: Rewrite,
) -> tuple[list[FoundBlock], set[AdditionEvent]]:
    """Give each block of `found` the additions that it makes in training mode only.

    Args:
        additions: each with the name of the block that it belongs to.

    Returns:
        The blocks; and the events that belong to no block.
    """
    blocks = list(found)
    deferred: list[Addition] = []
    for name in dict.fromkeys(name for name, _ in additions):
        own = [addition for block, addition in additions if block == name]
        numbers = [n for n, block in enumerate(blocks) if block.name == name]
        if not numbers or any(blocks[n].is_deferred for n in numbers):
            deferred += own
            continue
        if len(numbers) == 1:
            blocks[numbers[0]] = _with_rewritten(blocks[numbers[0]], own, rewrite)
            continue
        for n, addition in zip(numbers, own, strict=False):
            blocks[n] = _with_rewritten(blocks[n], [addition], rewrite)
        if len(own) != len(numbers):
            blocks[numbers[-1]] = replace(blocks[numbers[-1]], refusal=_UNLIKE)
    unassigned = set[AdditionEvent]()
    events = [event for addition in deferred for event in addition.events]
    for group in deferred_groups(events, analysis, modules):
        numbers = [n for n, block in enumerate(blocks) if block.name == group.block]
        for n in numbers[:1]:
            blocks[n] = _with_deferred(blocks[n], group, analysis, modules)
        if not numbers:
            unassigned.update(group.events)
    return blocks, unassigned


def with_counterparts(
    block: FoundBlock, counterparts: Mapping[AdditionEvent, AdditionEvent]
) -> FoundBlock:
    """A deferred block with its events in training mode as well."""
    units = [
        replace(
            unit,
            events=(*unit.events, *(counterparts[e] for e in unit.events if e in counterparts)),
        )
        for unit in block.units
    ]
    return replace(block, units=tuple(units))


def as_both_need(
    block: FoundBlock, counterparts: Mapping[AdditionEvent, AdditionEvent], training: Analysis
) -> FoundBlock:
    """`block`, deferring only modules that neither mode needs for anything but its addition."""
    events = [counterparts.get(event) for unit in block.units for event in unit.events]
    if not block.is_deferred or None in events:
        return block
    group = training.group(block.name, [event for event in events if event is not None])
    owner, _ = block.units[0].edits[0]
    if block.modules <= group.modules or group.owner.module is not owner:
        return block
    try:
        edits = deferred_edits(group, training)
    except UnsupportedBlockError:
        return block  # the proof names the module that training mode needs
    units = []
    for unit, edit in zip(block.units, edits, strict=True):
        before = unit.edits[0][1]
        assert isinstance(before, DeferredEdit)
        both = replace(before, calls=edit.calls)
        units.append(replace(unit, edits=((owner, both),), modules=frozenset(group.modules)))
    return replace(block, units=tuple(units), modules=group.modules)


def with_training_only(
    found: Sequence[FoundBlock], only: Sequence[FoundBlock], analysis: Analysis
) -> list[FoundBlock]:
    """`found` and the blocks `only`, which run in training mode only, in the order of execution.

    Args:
        analysis: the analysis of a pass in training mode.
    """

    def begins(block: FoundBlock) -> int:
        calls = [call for name in (block.name, *block.modules) for call in analysis.calls_of(name)]
        return min((call.serial for call in calls), default=0)

    blocks = list(found)
    for block in only:
        later = (n for n, other in enumerate(blocks) if begins(other) > begins(block))
        blocks.insert(next(later, len(blocks)), replace(block, training_only=True))
    return blocks


_UNLIKE = (
    "in training mode its module makes a different number of residual additions than in "
    'evaluation: granularity="block" gives all of them one gate'
)


def _with_rewritten(
    block: FoundBlock, additions: Sequence[Addition], rewrite: Rewrite
) -> FoundBlock:
    """`block`, with its methods rewritten at `additions` too."""
    if not block.is_rewritten:
        return block
    try:
        units = (*block.units, *map(rewrite, additions))
    except UnsupportedBlockError as error:
        return replace(block, refusal=f"in training mode it adds differently: {error}")
    called = Counter(name for addition in additions for name in addition.modules)
    return replace(block, units=units, modules=block.modules | called)


def _with_deferred(
    block: FoundBlock, group: Group, analysis: Analysis, modules: Mapping[str, nn.Module]
) -> FoundBlock:
    """The deferred `block`, with its additions in training mode."""
    if block.refusal:
        return block
    units = list(block.units)
    try:
        edits = deferred_edits(group, analysis)
        for event, edit in zip(group.events, edits, strict=True):
            names = {calls.module for calls in edit.calls}
            n = max(range(len(units)), key=lambda n: len(names & _names(units[n])))
            if modules[group.owner.name] is not units[n].edits[0][0] or not names & _names(
                units[n]
            ):
                raise UnsupportedBlockError("its branch calls different modules than in evaluation")
            units[n] = _with_edit(units[n], event, edit)
    except UnsupportedBlockError as error:
        return replace(block, refusal=f"in training mode it adds differently: {error}")
    return replace(block, units=tuple(units), modules=block.modules | group.modules)


def _with_edit(unit: Unit, event: AdditionEvent, edit: DeferredEdit) -> Unit:
    """A deferred unit that also has the call site of its addition in training mode."""
    owner, before = unit.edits[0]
    assert isinstance(before, DeferredEdit)
    calls = {each.module: each for each in before.calls}
    for each in edit.calls:
        known = calls.setdefault(each.module, each)
        if known != each and not (known.always and each.always):
            raise UnsupportedBlockError(
                f"{each.module!r} is called more or less often than in evaluation"
            )
    sites = tuple(dict.fromkeys((*before.sites, *edit.sites)))
    after = replace(before, sites=sites, calls=tuple(calls.values()))
    return replace(unit, edits=((owner, after),), events=(*unit.events, event))


def _names(unit: Unit) -> set[str]:
    """Names, relative to the owner, of the modules whose calls a deferred unit skips."""
    _, edit = unit.edits[0]
    assert isinstance(edit, DeferredEdit)
    return {calls.module for calls in edit.calls}
