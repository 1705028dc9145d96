"""The residual blocks of evaluation, as training mode needs them, and those that only it runs.

A block may use different expressions for its addition in training mode and in evaluation, for
example under `if self.training:`. Its one gate must close both. Other blocks run in training mode
only, for example those of an auxiliary head.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.blocks import FoundBlock, Unit
from stochastic_depth.surgery.edits import DeferredEdit
from stochastic_depth.surgery.find.branch_parameters import BlockWithEvents
from stochastic_depth.surgery.find.deferred_groups import deferred_edits, deferred_groups
from stochastic_depth.surgery.find.form_blocks import BlockSettings, form_blocks
from stochastic_depth.surgery.find.groups import Group, group_of
from stochastic_depth.surgery.find.mechanisms import edited_unit
from stochastic_depth.surgery.find.residual_additions import without_long_skips
from stochastic_depth.surgery.find.training_additions import InTraining
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis, Occurrence
from stochastic_depth.surgery.record.rejected import Rejected, own_backward


def with_training(
    pairs: Sequence[BlockWithEvents],
    evaluation: Analysis,
    training: InTraining,
    settings: BlockSettings,
) -> tuple[list[FoundBlock], list[Rejected]]:
    """The blocks with their additions in training mode, and the blocks that only it runs; and the
    additions of training mode that form no block.

    Args:
        pairs: the blocks found in evaluation mode, each with its events.
    """
    found = []
    for block, events in pairs:
        block = _outside_functions(block, events, training.analysis.functions)
        block = _called_alike(block, evaluation, training.analysis)
        block = _as_both_need(block, training.counterparts, training.analysis)
        found.append(_with_counterparts(block, training.counterparts))
    new = set(training.new)
    of_block = [
        (settings.block_of(a)[0], replace(a, events=events))
        for a in without_long_skips(training.additions, settings.modules)[0]
        if (events := tuple(event for event in a.events if event in new))
    ]
    of_block = [(n, a) for n, a in of_block if not n or settings.selected.allows(n, a.modules)]
    found, only = _with_additions(found, of_block, training.analysis, settings.modules)
    if not only:
        return found, training.rejected
    blocks, more = form_blocks(training.additions, training.analysis, settings)
    alone = [block for block, events in blocks if only.issuperset(events)]
    return _with_training_only(found, alone, training.analysis), [*training.rejected, *more]


def _outside_functions(
    block: FoundBlock, events: Sequence[AdditionEvent], functions: Mapping[CallSite, str]
) -> FoundBlock:
    """`block`, refused if an `autograd.Function` adds its branch in training mode."""
    around = [functions[event.site] for event in events if event.site in functions]
    return replace(block, refusal=own_backward(around[0])) if around else block


def _called_alike(block: FoundBlock, evaluation: Analysis, training: Analysis) -> FoundBlock:
    """`block`, refused if it is deferred and its modules are called more often in training mode."""
    if not block.is_deferred:
        return block
    for name in block.modules:
        before, now = len(evaluation.calls_of(name)), len(training.calls_of(name))
        if now > before:
            why = (
                f"{name!r} of its branch is called {now} times in training mode and {before} in "
                "evaluation: each call has its own gate, so both modes must make the same number "
                "of calls"
            )
            return replace(block, refusal=why)
    return block


def _with_additions(
    found: Sequence[FoundBlock],
    additions: Sequence[tuple[str, Addition]],
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
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
        of_block: dict[int | None, list[Addition]] = {}
        for addition in own:
            of_block.setdefault(_most_alike(blocks, name, addition), []).append(addition)
        for n, its in of_block.items():
            if n is None or blocks[n].is_deferred:
                deferred += its
            else:
                blocks[n] = _with_rewritten(blocks[n], its, modules)
    unassigned = set[AdditionEvent]()
    events = [event for addition in deferred for event in addition.events]
    for group in deferred_groups(events, analysis, modules):
        if sum(block.name == group.name for block in blocks) == 1:
            parts = [group]
        else:
            parts = [group_of(group.name, [event], analysis) for event in group.events]
        for part in parts:
            n = _most_alike(blocks, group.name, part)
            if n is None:
                unassigned.update(part.events)
            else:
                blocks[n] = _with_deferred(blocks[n], part, analysis, modules)
    return blocks, unassigned


def _most_alike(blocks: Sequence[FoundBlock], name: str, added: Addition | Group) -> int | None:
    """The number of the block of this name that has most modules and parameters of its branch in
    common with what training mode adds; None if no block has this name."""
    runs = {*added.modules, *added.parameters}
    common = {
        n: len(runs & {*block.modules, *block.parameters})
        for n, block in enumerate(blocks)
        if block.name == name
    }
    return max(common, key=lambda n: common[n], default=None)


def _with_counterparts(
    block: FoundBlock, counterparts: Mapping[Occurrence, AdditionEvent]
) -> FoundBlock:
    """A deferred block with its events in training mode as well."""

    def with_both(unit: Unit) -> Unit:
        more = [counterparts[each].occurrence for each in unit.occurrences if each in counterparts]
        return replace(unit, occurrences=(*unit.occurrences, *more))

    return replace(block, units=tuple(map(with_both, block.units)))


def _as_both_need(
    block: FoundBlock, counterparts: Mapping[Occurrence, AdditionEvent], training: Analysis
) -> FoundBlock:
    """`block`, deferring only modules that neither mode needs for anything but its addition."""
    events = [counterparts.get(each) for unit in block.units for each in unit.occurrences]
    if not block.is_deferred or None in events:
        return block
    group = group_of(block.name, [event for event in events if event is not None], training)
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


def _with_training_only(
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


def _with_rewritten(
    block: FoundBlock, additions: Sequence[Addition], modules: Mapping[str, nn.Module]
) -> FoundBlock:
    """`block`, with its methods rewritten at `additions` too."""
    if not block.is_rewritten:
        return block
    try:
        units = (*block.units, *(edited_unit(each, modules) for each in additions))
    except UnsupportedBlockError as error:
        return replace(block, refusal=f"in training mode it adds differently: {error}")
    called = Counter(name for addition in additions for name in addition.modules)
    return replace(block, units=units, modules=block.modules | called)


def _with_deferred(
    block: FoundBlock, group: Group, analysis: Analysis, modules: Mapping[str, nn.Module]
) -> FoundBlock:
    """The deferred `block`, with its additions in training mode."""
    if not block.is_deferred:
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
    return replace(unit, edits=((owner, after),), occurrences=(*unit.occurrences, event.occurrence))


def _names(unit: Unit) -> set[str]:
    """Names, relative to the owner, of the modules whose calls a deferred unit skips."""
    _, edit = unit.edits[0]
    assert isinstance(edit, DeferredEdit)
    return {calls.module for calls in edit.calls}
