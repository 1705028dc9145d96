"""Find the residual blocks of any model, and the mechanism by which each is made skippable.

The additions of one forward pass are grouped into blocks. Long skip connections, sums of hidden
states and other sums that are not residual blocks are left out. A block whose source cannot be
rewritten is deferred.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.additions import discover
from stochastic_depth.surgery.blocks import (
    Found,
    Granularity,
    branch_modules,
    is_repeated,
    repeated_block,
    residual_block,
)
from stochastic_depth.surgery.branch_source import Addition
from stochastic_depth.surgery.branches import MIN_SAVED, Analysis, Event, mostly_shared
from stochastic_depth.surgery.edits import Site
from stochastic_depth.surgery.example import Example, caller, preserve_state
from stochastic_depth.surgery.mechanisms import (
    clashes,
    deferred_block,
    edited_block,
    registered_around,
    rewritten_unit,
)
from stochastic_depth.surgery.rejected import COUPLING, Rejected, own_backward
from stochastic_depth.surgery.select_modules import Choice, Chosen, chosen_modules
from stochastic_depth.surgery.syntax import in_loop
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

LONG_SKIP = "a long skip connection: "


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
        additions = _residual_ones(additions, self.modules, rejected)
        for event in (event for addition in additions for event in addition.events):
            analysis.place(event)
        additions = _without_sums(additions, analysis, rejected)
        blocks: dict[tuple[str, Any], list[Addition]] = {}
        for addition in additions:
            key = _block_of(addition, self.modules, self.granularity)
            blocks.setdefault(key, []).append(addition)
        edited = [
            (edited_block(name, outermost, self.modules, analysis), outermost)
            for (name, _), group in blocks.items()
            if (outermost := _outermost(group, analysis))
        ]
        rewritten, others = self._divided(edited)
        return self._assembled(edited, rewritten, others, analysis, rejected)

    def _divided(
        self, edited: list[tuple[Found, list[Addition]]]
    ) -> tuple[list[tuple[Found, list[Addition]]], list[tuple[Found, list[Addition]]]]:
        """Divide the blocks into those whose methods are rewritten, and those that are deferred."""
        rewritten, others = [], []
        for found, group in edited:
            fixed = found.mechanism in ("registered", "Residual")
            repeated = found.name in self.defer or any(len(a.events) > 1 for a in group)
            repeated |= (
                not found.name and len(group) > 1
            )  # the model writes its additions out one by one
            deferred = found.refusal or (repeated and not fixed)
            (others if deferred else rewritten).append((found, group))
        while True:  # a deferred addition must stay where it is in the source
            events = _events(others)
            clash = [clashes(found, events) for found, _ in rewritten]
            if not any(clash):
                return rewritten, others
            others += [pair for pair, clashes in zip(rewritten, clash, strict=True) if clashes]
            rewritten = [
                pair for pair, clashes in zip(rewritten, clash, strict=True) if not clashes
            ]

    def _assembled(
        self,
        edited: list[tuple[Found, list[Addition]]],
        rewritten: list[tuple[Found, list[Addition]]],
        others: list[tuple[Found, list[Addition]]],
        analysis: Analysis,
        rejected: list[Rejected],
    ) -> list[tuple[Found, tuple[Event, ...]]]:
        """All blocks, in the order of their additions; long skip connections go to `rejected`.

        Args:
            edited: the blocks of `rewritten` and `others` together.
        """
        modules, chosen = self.modules, self.chosen
        groups = analysis.blocks(_events(others), lambda name: repeated_block(name, modules))
        if self.granularity == "unit":
            groups = [analysis.group(g.block, [event]) for g in groups for event in g.events]
        events_of = [(found.name, _events([(found, group)])) for found, group in rewritten]
        events_of += [(group.block, list(group.events)) for group in groups]
        covered = [_is_covered(n, events_of, analysis) for n in range(len(events_of))]
        kept = [not inner for inner in covered]
        rewritten = list(itertools.compress(rewritten, kept))
        groups = list(itertools.compress(groups, kept[-len(groups) :])) if groups else groups
        events_of = list(itertools.compress(events_of, kept))
        long = _long_skips(events_of, analysis)
        for found, group in edited:
            events = set(_events([(found, group)]))
            if any(name in long and not events.isdisjoint(own) for name, own in events_of):
                reason = f"{LONG_SKIP}other blocks are inside"
                rejected += [_rejected(addition, reason) for addition in group]
        blocks = []
        for (found, group), (name, events) in zip(rewritten, events_of, strict=False):
            unit = found.module
            runs = branch_modules(name, unit) if isinstance(unit, Residual) else found.modules
            if chosen.has(group[0].owner, runs) and name not in long:
                own = analysis.group(name, events).own if found.mechanism in REWRITTEN else 1
                if own < MIN_SAVED:
                    found = replace(found, refusal=mostly_shared(own))
                blocks.append((found, tuple(events)))
        first: Counter[str] = Counter()
        reasons = {event: pair[0].refusal for pair in others for event in _events([pair])}
        for group in groups:
            if chosen.has(group.block, group.modules) and group.block not in long:
                found = deferred_block(group, analysis, modules, first, reasons)
                blocks.append((found, group.events))
        return sorted(blocks, key=lambda pair: min(event.total for event in pair[1]))

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
            for a in _residual_ones(training.additions, self.modules, [])
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


def _events(pairs: Iterable[tuple[Found, list[Addition]]]) -> list[Event]:
    """All events of the additions of some blocks."""
    return [event for _, group in pairs for addition in group for event in addition.events]


def _is_covered(
    number: int, blocks: Sequence[tuple[str, Sequence[Event]]], analysis: Analysis
) -> bool:
    """Whether a block is in the branch of another block of its name, whose gate covers it.

    An example is a layer that has a residual addition inside, and whose output the model adds
    again.
    """
    name, events = blocks[number]
    around = [
        other
        for n, (its_name, others) in enumerate(blocks)
        if n != number and its_name == name
        for other in others
    ]
    return all(any(analysis.surrounds(other, event) for other in around) for event in events)


def _long_skips(blocks: Sequence[tuple[str, Sequence[Event]]], analysis: Analysis) -> set[str]:
    """Names of the blocks that are long skip connections, or are made by the same loop as one."""
    long = {name for name, _ in blocks if _is_long(name, blocks, analysis)}
    loops = {_loop(event) for name, events in blocks if name in long for event in events}
    return long | {name for name, events in blocks if loops.issuperset(map(_loop, events))}


def _loop(event: Event) -> object:
    """A key that is equal for additions of the same expression during one call of one module."""
    assert event.enclosing is not None
    return event.site, event.enclosing.serial


def _is_long(name: str, blocks: Sequence[tuple[str, Sequence[Event]]], analysis: Analysis) -> bool:
    """Whether `name` is a long skip connection: blocks of other modules are in its branch."""
    return any(
        analysis.surrounds(event, other)
        for its_name, events in blocks
        if its_name == name
        for event in events
        for inner, others in blocks
        if inner != name and not (name and inner.startswith(f"{name}."))
        for other in others
    )


def _residual_ones(
    additions: list[Addition], modules: Mapping[str, nn.Module], rejected: list[Rejected]
) -> list[Addition]:
    """The additions that may form a block; the others go to `rejected`, each with the reason."""
    names = {addition.owner: repeated_block(addition.owner, modules) for addition in additions}
    kept = []
    for addition in additions:
        if _accumulates(addition):
            rejected.append(_rejected(addition, "it adds up the terms of one sum in a loop"))
            continue
        name = names[addition.owner]
        inside = max(
            len({names[other] for other in event.modules if names.get(other, name) != name})
            for event in addition.events
        )
        reason = ""
        if isinstance(modules[addition.owner], Residual) or is_repeated(name, modules):
            pass
        elif inside > 1:
            reason = f"{LONG_SKIP}{inside} other blocks are inside of it"
        elif addition.upsamples:
            reason = f"{LONG_SKIP}its branch makes values smaller and then larger again"
        elif not addition.identity and not name and addition.is_last and len(additions) > 1:
            reason = "a sum of two outputs of the model"
        if reason:
            rejected.append(_rejected(addition, reason))
        else:
            kept.append(addition)
    return kept


def _without_sums(
    additions: list[Addition], analysis: Analysis, rejected: list[Rejected]
) -> list[Addition]:
    """The additions that add a branch; sums of streams or of hidden states go to `rejected`."""
    totals = {event.total for addition in additions for event in addition.events}
    streams = {event.total for a in additions if a.identity for event in a.events}
    events = {event for addition in additions for event in addition.events}
    kept = []
    for addition in additions:
        if addition.coupled is not None:
            if addition.coupled not in events:
                rejected.append(_rejected(addition, COUPLING))
                continue
            if all(analysis.surrounds(addition.coupled, event) for event in addition.events):
                reason = "a bias: its sum is used in the branch of another block only"
                rejected.append(_rejected(addition, reason))
                continue
        joins = any(not event.branch.isdisjoint(streams) for event in addition.events)
        if joins and not addition.identity and not addition.owner:
            reason = "a sum of two streams, one of which has residual blocks of its own"
            rejected.append(_rejected(addition, reason))
        elif all(
            event.added in totals and not analysis.exclusive(event.branch, {event.total})
            for event in addition.events
        ):
            reason = "a sum of hidden states: it adds a value that the next block begins with"
            rejected.append(_rejected(addition, reason))
        else:
            kept.append(addition)
    return kept


def _outermost(additions: list[Addition], analysis: Analysis) -> list[Addition]:
    """The additions under one coin that are not in the branch of another one of them.

    An addition in a branch is covered by the gate of that branch. Additions whose sum no output
    needs are left out if there are others.
    """
    alive = [a for a in additions if any(e.total in analysis.alive for e in a.events)]
    additions = alive or additions
    events = [(addition, event) for addition in additions for event in addition.events]
    return [
        addition
        for addition in additions
        if not all(
            any(event.total in analysis.inside(e) for a, e in events if a is not addition)
            for event in addition.events
        )
    ]


def _rejected(addition: Addition, reason: str) -> Rejected:
    _, edit = addition.edits[0]
    return Rejected(addition.owner, str(edit or "in a function"), reason)


def _accumulates(addition: Addition) -> bool:
    """Whether an addition adds up the terms of one sum in a loop, and is therefore not residual."""
    _, edit = addition.edits[0]
    if edit is None or addition.identity:
        return False
    if len(addition.events) > 1:  # the shortcut of each is then the sum so far
        totals = {event.total for event in addition.events}
        return any(event.shortcut in totals for event in addition.events)
    try:
        return in_loop(edit.place)
    except UnsupportedBlockError:  # its source is not there
        return False


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
