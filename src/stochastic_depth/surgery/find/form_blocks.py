"""Form residual blocks from the additions of one recorded forward pass.

Long skip connections, sums of hidden states and other sums that are not residual blocks are
rejected. A block whose source cannot be rewritten is deferred.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stochastic_depth.choices import Granularity
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import FoundBlock, is_inside, repeated_block
from stochastic_depth.surgery.find.branch_parameters import BlockWithEvents
from stochastic_depth.surgery.find.deferred_groups import deferred_groups
from stochastic_depth.surgery.find.groups import MIN_SAVED, Group, group_of, mostly_shared
from stochastic_depth.surgery.find.mechanisms import (
    change_of_shortcut,
    clashes,
    deferred_block,
    edited_block,
    numbered,
    registered_around,
)
from stochastic_depth.surgery.find.residual_additions import (
    LONG_SKIP,
    outermost,
    rejected_as,
    without_long_skips,
    without_sums,
)
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis
from stochastic_depth.surgery.record.rejected import Rejected
from stochastic_depth.surgery.select_modules import SelectedModules


@dataclass(frozen=True)
class BlockSettings:
    """The choices of the user that decide which blocks the additions form."""

    modules: Mapping[str, nn.Module]
    """All modules of the model, by name."""
    selected: SelectedModules
    granularity: Granularity
    defer: Container[str]
    """Names of blocks to defer even if their source can be rewritten."""

    def block_of(self, addition: Addition) -> tuple[str, Any]:
        """The name of the block that an addition belongs to, and a key for its gate in it."""
        if isinstance(self.modules[addition.owner], Residual):
            return addition.owner, None
        whole = registered_around(addition.owner, self.modules)
        if self.granularity == "unit":
            return (addition.owner, addition.edits) if whole is None else (whole, None)
        return repeated_block(whole or addition.owner, self.modules), None


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Additions in the source that share a gate, and their block if methods are rewritten."""

    name: str
    additions: Sequence[Addition]
    events: Sequence[AdditionEvent]
    block: FoundBlock


def form_blocks(
    additions: list[Addition], analysis: Analysis, settings: BlockSettings
) -> tuple[list[BlockWithEvents], list[Rejected]]:
    """The blocks that `additions` form, in the order of execution; and those that form none."""
    additions, rejected = without_long_skips(additions, settings.modules)
    additions, sums = without_sums(additions)
    candidates = _candidates(additions, analysis, settings)
    rewritten, deferred = _divided(candidates, analysis, settings)
    formed = _without_covered([*rewritten, *_groups(deferred, analysis, settings)])
    formed, long = _without_long(formed, candidates)
    refusals = {event: each.block.refusal for each in deferred for event in each.events}
    pairs = [
        (_block(each, analysis, settings.modules, refusals), tuple(each.events))
        for each in formed
        if _is_selected(each, settings.selected)
    ]
    in_order = sorted(numbered(pairs), key=lambda pair: min(event.total for event in pair[1]))
    return in_order, [*rejected, *sums, *long]


def _candidates(
    additions: Sequence[Addition], analysis: Analysis, settings: BlockSettings
) -> list[_Candidate]:
    """The additions by gate, without those in the branch of a different one with this gate."""
    together: dict[tuple[str, Any], list[Addition]] = {}
    for addition in additions:
        together.setdefault(settings.block_of(addition), []).append(addition)
    candidates = []
    for (name, _), members in together.items():
        outer = set(outermost([e for a in members for e in a.events], analysis))
        if kept := [addition for addition in members if not outer.isdisjoint(addition.events)]:
            events = [event for addition in kept for event in addition.events]
            block = edited_block(name, kept, settings.modules, analysis.recording)
            candidates.append(_Candidate(name, kept, events, block))
    return candidates


def _divided(
    candidates: Sequence[_Candidate], analysis: Analysis, settings: BlockSettings
) -> tuple[list[_Candidate], list[_Candidate]]:
    """The candidates whose methods are rewritten, and those that are deferred."""
    rewritten, deferred = [], []
    for each in candidates:
        must = _must_be_deferred(each, analysis, settings.defer)
        (deferred if must else rewritten).append(each)
    while True:  # a deferred addition must keep its position in the source
        events = [event for each in deferred for event in each.events]
        clash = [each for each in rewritten if clashes(each.block, events)]
        if not clash:
            return rewritten, deferred
        deferred += clash
        rewritten = [each for each in rewritten if each not in clash]


def _must_be_deferred(candidate: _Candidate, analysis: Analysis, defer: Container[str]) -> bool:
    """Whether a candidate must be deferred regardless of the other candidates."""
    if candidate.block.refusal:
        return True
    if not candidate.block.is_rewritten:
        return False
    in_a_loop = any(_loops(addition.events, analysis) for addition in candidate.additions)
    one_by_one = not candidate.name and len(candidate.additions) > 1  # in the model's own method
    return candidate.name in defer or in_a_loop or one_by_one


def _loops(events: Sequence[AdditionEvent], analysis: Analysis) -> bool:
    """Whether an expression adds the branches of several modules, or adds to its own sums."""
    modules = {event.modules for event in events}
    return len(modules) > 1 or any(analysis.iterations(events).values())


def _groups(
    deferred: Sequence[_Candidate], analysis: Analysis, settings: BlockSettings
) -> list[Group]:
    """The additions of the deferred candidates, grouped by gate."""
    events = [event for each in deferred for event in each.events]
    groups = deferred_groups(events, analysis, settings.modules)
    if settings.granularity == "block":
        return groups
    return [
        group_of(group.name, [e for e in group.events if e.site == site], analysis)
        for group in groups
        for site in dict.fromkeys(event.site for event in group.events)
    ]


def _contained(blocks: Sequence[_Candidate | Group]) -> set[tuple[str, int]]:
    """The sums that only branches of `blocks` need, each with the name of such a block."""
    totals = {event.total for block in blocks for event in block.events}
    return {
        (block.name, total)
        for block in blocks
        for event in block.events
        for total in totals & event.exclusive
        if event.contains(total)
    }


def _without_covered(blocks: Sequence[_Candidate | Group]) -> list[_Candidate | Group]:
    """The blocks that are not in the branch of a different block of the same name.

    The gate of that block covers them. An example is a layer with a residual addition inside,
    whose output the model adds to its input.
    """
    inside = _contained(blocks)
    return [
        block
        for block in blocks
        if not all((block.name, event.total) in inside for event in block.events)
    ]


def _without_long(
    blocks: Sequence[_Candidate | Group], candidates: Sequence[_Candidate]
) -> tuple[list[_Candidate | Group], list[Rejected]]:
    """The blocks that are not long skip connections, and the additions of the others.

    A long skip connection has blocks of other modules in its branch. What the same loop makes is
    one, too.
    """
    name_of = {event.total: block.name for block in blocks for event in block.events}
    long = {
        name
        for name, total in _contained(blocks)
        if name_of[total] != name and not (name and is_inside(name_of[total], name))
    }
    loops = {_loop(event) for each in blocks if each.name in long for event in each.events}
    long |= {each.name for each in blocks if loops.issuperset(map(_loop, each.events))}
    events = {event for each in blocks if each.name in long for event in each.events}
    rejected = [
        rejected_as(addition, f"{LONG_SKIP}other blocks are inside")
        for candidate in candidates
        if not events.isdisjoint(candidate.events)
        for addition in candidate.additions
    ]
    return [each for each in blocks if each.name not in long], rejected


def _loop(event: AdditionEvent) -> object:
    """A key that is equal for additions by the same expression in the same call of a module."""
    return event.site, event.enclosing


def _is_selected(block: _Candidate | Group, selected: SelectedModules) -> bool:
    if isinstance(block, Group):
        return selected.allows(block.name, block.modules)
    return selected.allows(block.additions[0].owner, block.block.names_in_branch())


def _block(
    formed: _Candidate | Group,
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
    refusals: Mapping[AdditionEvent, str],
) -> FoundBlock:
    """The block; refused if most of its branch is needed elsewhere."""
    if isinstance(formed, Group):
        block = deferred_block(formed, analysis, modules, refusals)
    else:
        block = formed.block
    if block.is_rewritten:
        share = group_of(formed.name, formed.events, analysis).exclusive_share
        if share < MIN_SAVED:
            block = replace(block, refusal=mostly_shared(share))
    return replace(block, in_place_problem=change_of_shortcut(formed.events, analysis.recording))
