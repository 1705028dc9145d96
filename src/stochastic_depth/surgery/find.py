"""Find the residual blocks of any model, and the mechanism by which each is made skippable.

The additions of one forward pass are grouped into blocks. Long skip connections, sums of hidden
states and other sums that are not residual blocks are left out. A block whose source cannot be
rewritten is deferred.
"""

import functools
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.additions import discover
from stochastic_depth.surgery.blocks import (
    Found,
    Granularity,
    branch_modules,
    repeated_block,
    residual_block,
)
from stochastic_depth.surgery.branch_source import Addition
from stochastic_depth.surgery.branches import MIN_SAVED, Analysis, Event, Group, mostly_shared
from stochastic_depth.surgery.deferred_groups import deferred_groups
from stochastic_depth.surgery.edits import Site
from stochastic_depth.surgery.example import Example, caller, preserve_state
from stochastic_depth.surgery.mechanisms import (
    clashes,
    deferred_block,
    edited_block,
    registered_around,
    rewritten_unit,
)
from stochastic_depth.surgery.rejected import Rejected, own_backward
from stochastic_depth.surgery.residual_additions import (
    LONG_SKIP,
    outermost,
    rejected_as,
    without_long_skips,
    without_sums,
)
from stochastic_depth.surgery.select_modules import Choice, Chosen, chosen_modules
from stochastic_depth.surgery.training_additions import (
    InTraining,
    added_in_training,
    as_both_need,
    joined,
    with_events,
    with_training_only,
)

REWRITTEN = ("slice", "call")
"""The mechanisms that rewrite a method."""


def find_residuals(model: nn.Module, include: Choice | None, exclude: Choice) -> list[Found]:
    """The `Residual` units of `model`, in order of registration."""
    chosen = chosen_modules(model, include, exclude)
    return [
        residual_block(name, module, 0)
        for name, module in model.named_modules()
        if isinstance(module, Residual) and chosen.has(name, branch_modules(name, module))
    ]


def find_blocks(
    model: nn.Module,
    example: Example,
    granularity: Granularity,
    include: Choice | None,
    exclude: Choice,
    count_flops: bool = False,
    *,
    defer: Container[str] = frozenset(),
    rejected: list[Rejected] | None = None,
) -> list[Found]:
    """The residual blocks of `model`, in the order in which they run on `example`.

    Args:
        defer: names of blocks that are deferred even where their source can be rewritten.
        rejected: this list gets the additions that are not taken as blocks, each with the reason.
    """
    rejected = [] if rejected is None else rejected
    chosen = chosen_modules(model, include, exclude)
    finder = _Finder(model, dict(model.named_modules()), chosen, granularity, defer)
    run = caller(model, example)
    with preserve_state(model):
        model.eval()
        additions, analysis = discover(model, run, count_flops, rejected)
    pairs = finder.blocks(additions, analysis, rejected)
    found = [block for block, _ in pairs]
    if any(block.refusal for block in found):
        refuse_cache(analysis.output)  # filling the cache may be all that needs the branches
    training = added_in_training(model, run, found, additions, analysis, count_flops)
    return found if training is None else finder.with_training(pairs, analysis, training, rejected)


def _outside_functions(block: Found, events: Sequence[Event], within: Mapping[Site, str]) -> Found:
    """`block`, refused if its branch is added in an `autograd.Function` in training mode."""
    functions = [within[event.site] for event in events if event.site in within]
    return replace(block, refusal=own_backward(functions[0])) if functions else block


def _called_alike(block: Found, evaluation: Analysis, training: Analysis) -> Found:
    """`block`, refused if it is deferred and its modules are called more often in training mode."""
    if block.mechanism != "deferred":
        return block
    for name in block.modules:
        before, now = len(evaluation.calls_of(name)), len(training.calls_of(name))
        if now > before:
            why = (
                f"{name!r} of its branch is called {now} times in training mode and {before} in "
                "evaluation: each call has a gate of its own, so both must call it equally often"
            )
            return replace(block, refusal=why)
    return block


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A block as it would be if its source could be rewritten, and the additions that form it."""

    found: Found
    additions: tuple[Addition, ...]

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(event for addition in self.additions for event in addition.events)


@dataclass(frozen=True, eq=False)
class _Formed:
    """Additions that share a gate: a candidate that is rewritten, or a group that is deferred."""

    name: str
    events: tuple[Event, ...]
    made_of: _Candidate | Group


@dataclass(frozen=True)
class _Finder:
    """Groups the additions of one model into blocks, as the user has chosen."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """All modules of the model, by name."""
    chosen: Chosen
    granularity: Granularity
    defer: Container[str]
    """Names of blocks that are deferred even where their source can be rewritten."""

    def blocks(
        self, additions: list[Addition], analysis: Analysis, rejected: list[Rejected]
    ) -> list[tuple[Found, tuple[Event, ...]]]:
        """The blocks that `additions` form, in order, each with its events."""
        additions = without_long_skips(additions, self.modules, rejected)
        for event in (event for addition in additions for event in addition.events):
            analysis.place(event)
        additions = without_sums(additions, analysis, rejected)
        together: dict[tuple[str, Any], list[Addition]] = {}
        for addition in additions:
            key = _block_of(addition, self.modules, self.granularity)
            together.setdefault(key, []).append(addition)
        candidates = [
            _Candidate(edited_block(name, kept, self.modules, analysis), tuple(kept))
            for (name, _), group in together.items()
            if (kept := outermost(group, analysis))
        ]
        rewritten, deferred = self._divided(candidates, analysis)
        groups = self._groups(deferred, analysis)
        formed = [_Formed(c.found.name, c.events, c) for c in rewritten]
        formed += [_Formed(group.block, group.events, group) for group in groups]
        formed = [each for each in formed if not _is_covered(each, formed, analysis)]
        long = _long_skips(formed, analysis)
        for candidate in candidates:
            own = set(candidate.events)
            if any(each.name in long and not own.isdisjoint(each.events) for each in formed):
                reason = f"{LONG_SKIP}other blocks are inside"
                rejected += [rejected_as(addition, reason) for addition in candidate.additions]
        formed = [each for each in formed if each.name not in long]
        blocks = [
            (replace(found, change=analysis.change_of_shortcut(events)), events)
            for found, events in self._assembled(formed, deferred, analysis)
        ]
        return sorted(blocks, key=lambda pair: min(event.total for event in pair[1]))

    def _divided(
        self, candidates: Sequence[_Candidate], analysis: Analysis
    ) -> tuple[list[_Candidate], list[_Candidate]]:
        """The candidates whose methods are rewritten, and those that are deferred."""
        rewritten, deferred = [], []
        for each in candidates:
            (deferred if self._is_deferred(each, analysis) else rewritten).append(each)
        while True:  # a deferred addition must stay where it is in the source
            events = [event for each in deferred for event in each.events]
            clash = [each for each in rewritten if clashes(each.found, events)]
            if not clash:
                return rewritten, deferred
            deferred += clash
            rewritten = [each for each in rewritten if each not in clash]

    def _is_deferred(self, candidate: _Candidate, analysis: Analysis) -> bool:
        """Whether it is deferred by itself, whatever becomes of the other candidates."""
        found, additions = candidate.found, candidate.additions
        if found.refusal:
            return True
        if found.mechanism in ("registered", "Residual"):
            return False
        in_a_loop = any(_loops(addition.events, analysis) for addition in additions)
        one_by_one = not found.name and len(additions) > 1  # in the forward method of the model
        return found.name in self.defer or in_a_loop or one_by_one

    def _groups(self, deferred: Sequence[_Candidate], analysis: Analysis) -> list[Group]:
        """The additions of the deferred candidates, in groups that have a gate each."""
        events = [event for each in deferred for event in each.events]
        groups = deferred_groups(events, analysis, self.modules)
        if self.granularity == "unit":
            return [
                analysis.group(group.block, [e for e in group.events if e.site == site])
                for group in groups
                for site in dict.fromkeys(event.site for event in group.events)
            ]
        return groups

    def _assembled(
        self, formed: Sequence[_Formed], deferred: Sequence[_Candidate], analysis: Analysis
    ) -> list[tuple[Found, tuple[Event, ...]]]:
        """The blocks among `formed` that the user has chosen, each with its events.

        Args:
            deferred: the candidates from which the groups in `formed` were made.
        """
        blocks = []
        first: Counter[str] = Counter()
        reasons = {event: each.found.refusal for each in deferred for event in each.events}
        for each in formed:
            if isinstance(each.made_of, Group):
                if self.chosen.has(each.name, each.made_of.modules):
                    found = deferred_block(each.made_of, analysis, self.modules, first, reasons)
                    blocks.append((found, each.events))
                continue
            found, unit = each.made_of.found, each.made_of.found.module
            runs = branch_modules(each.name, unit) if isinstance(unit, Residual) else found.modules
            if not self.chosen.has(each.made_of.additions[0].owner, runs):
                continue
            if found.mechanism in REWRITTEN:
                own = analysis.group(each.name, each.events).own
                if own < MIN_SAVED:
                    found = replace(found, refusal=mostly_shared(own))
            blocks.append((found, each.events))
        return blocks

    def with_training(
        self,
        pairs: Sequence[tuple[Found, tuple[Event, ...]]],
        evaluation: Analysis,
        training: InTraining,
        rejected: list[Rejected],
    ) -> list[Found]:
        """The blocks with their additions in training mode, and the blocks that run there only.

        Args:
            pairs: the blocks found in evaluation mode, each with its events.
        """
        found = []
        for block, events in pairs:
            block = _outside_functions(block, events, training.within)
            block = _called_alike(block, evaluation, training.analysis)
            block = as_both_need(block, training.again, training.analysis)
            found.append(with_events(block, training.again))
        new = set(training.new)
        of_block = [
            (_block_of(a, self.modules, self.granularity)[0], replace(a, events=events))
            for a in without_long_skips(training.additions, self.modules, [])
            if (events := tuple(event for event in a.events if event in new))
        ]
        of_block = [(n, a) for n, a in of_block if not n or self.chosen.has(n, a.modules)]
        rewrite = functools.partial(rewritten_unit, modules=self.modules)
        found, alone = joined(found, of_block, training.analysis, self.modules, rewrite)
        later: list[Rejected] = training.rejected
        blocks = self.blocks(training.additions, training.analysis, later) if alone else []
        known = {(each.owner, each.place) for each in rejected}
        rejected += [each for each in later if (each.owner, each.place) not in known]
        return with_training_only(
            found,
            [block for block, events in blocks if alone.issuperset(events)],
            training.analysis,
        )


def _loops(events: Sequence[Event], analysis: Analysis) -> bool:
    """Whether an expression adds the branches of several modules, or to its own sums again."""
    modules = {event.modules for event in events}
    return len(modules) > 1 or any(analysis.turns(events).values())


def _is_covered(block: _Formed, blocks: Sequence[_Formed], analysis: Analysis) -> bool:
    """Whether a block is in the branch of another block of its name, whose gate covers it.

    An example is a layer that has a residual addition inside, and whose output the model adds
    again.
    """
    around = [
        other
        for each in blocks
        if each is not block and each.name == block.name
        for other in each.events
    ]
    return all(any(analysis.surrounds(other, event) for other in around) for event in block.events)


def _long_skips(blocks: Sequence[_Formed], analysis: Analysis) -> set[str]:
    """Names of the blocks that are long skip connections, or are made by the same loop as one."""
    long = {each.name for each in blocks if _is_long(each.name, blocks, analysis)}
    loops = {_loop(event) for each in blocks if each.name in long for event in each.events}
    return long | {each.name for each in blocks if loops.issuperset(map(_loop, each.events))}


def _loop(event: Event) -> object:
    """A key that is equal for additions of the same expression during one call of one module."""
    assert event.enclosing is not None
    return event.site, event.enclosing.serial


def _is_long(name: str, blocks: Sequence[_Formed], analysis: Analysis) -> bool:
    """Whether `name` is a long skip connection: blocks of other modules are in its branch."""
    return any(
        analysis.surrounds(event, other)
        for block in blocks
        if block.name == name
        for event in block.events
        for inner in blocks
        if inner.name != name and not (name and inner.name.startswith(f"{name}."))
        for other in inner.events
    )


def _block_of(
    addition: Addition, modules: Mapping[str, nn.Module], granularity: Granularity
) -> tuple[str, Any]:
    """The name of the block that an addition belongs to, and a key for its coin in the block."""
    if isinstance(modules[addition.owner], Residual):
        return addition.owner, None
    whole = registered_around(addition.owner, modules)
    if granularity == "unit":
        return (addition.owner, addition.edits) if whole is None else (whole, None)
    return repeated_block(whole or addition.owner, modules), None
