"""Find the residual blocks of any model, and the mechanism by which each is made skippable.

The additions of one forward pass are grouped into blocks. Long skip connections, sums of hidden
states and other sums that are not residual blocks are rejected. A block whose source cannot be
rewritten is deferred.
"""

import functools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stochastic_depth.choices import Granularity
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import (
    FoundBlock,
    nothing_found,
    repeated_block,
    residual_block,
)
from stochastic_depth.surgery.example import Example, caller, preserve_state
from stochastic_depth.surgery.find.branch_parameters import (
    BlockWithEvents,
    NamedRoutes,
    attribute_parameters,
    attribute_parameters_of_units,
    routes_of_gradients,
    routes_of_units,
)
from stochastic_depth.surgery.find.deferred_groups import deferred_groups
from stochastic_depth.surgery.find.mechanisms import (
    clashes,
    deferred_block,
    edited_block,
    numbered,
    registered_around,
    rewritten_unit,
)
from stochastic_depth.surgery.find.residual_additions import (
    LONG_SKIP,
    outermost,
    rejected_as,
    without_long_skips,
    without_sums,
)
from stochastic_depth.surgery.find.training_additions import (
    InTraining,
    added_in_training,
    as_both_need,
    with_counterparts,
    with_training_additions,
    with_training_only,
)
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.surgery.record.additions import discover
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import (
    MIN_SAVED,
    AdditionEvent,
    Analysis,
    Group,
    mostly_shared,
)
from stochastic_depth.surgery.record.rejected import Rejected, listed, own_backward
from stochastic_depth.surgery.select_modules import ModuleSelector, SelectedModules, select_modules


@dataclass(frozen=True)
class Found:
    """What a model adds."""

    blocks: list[FoundBlock]
    """Its residual blocks, in the order in which they run on the example, if there is one."""
    rejected: list[Rejected]
    """Additions that form no block."""
    routes: NamedRoutes


def find_residuals(
    model: nn.Module, include: ModuleSelector | None, exclude: ModuleSelector
) -> Found:
    """Find the `Residual` units of `model`, in order of registration.

    Raises:
        ApplyError: when there are none.
    """
    selected = select_modules(model, include, exclude)
    blocks = [
        residual_block(name, module, 0)
        for name, module in model.named_modules()
        if isinstance(module, Residual)
    ]
    blocks = [each for each in blocks if selected.allows(each.name, each.names_in_branch())]
    if not blocks:
        raise nothing_found(model, None)
    blocks = attribute_parameters_of_units(blocks, model)
    return Found(blocks, [], routes_of_units(blocks, model))


def find_blocks(
    model: nn.Module,
    example: Example,
    granularity: Granularity,
    include: ModuleSelector | None,
    exclude: ModuleSelector,
    *,
    defer: Container[str],
    count_flops: bool,
) -> Found:
    """Find the residual blocks of `model`.

    Args:
        defer: names of blocks to defer even if their source can be rewritten.

    Raises:
        ApplyError: when there are none.
    """
    selected = select_modules(model, include, exclude)
    finder = _Finder(model, dict(model.named_modules()), selected, granularity, defer)
    run = caller(model, example)
    with preserve_state(model):
        model.eval()
        additions, analysis, not_residual = discover(
            model, run, count_flops=count_flops, gradients=False
        )
    pairs, no_blocks = finder.blocks(additions, analysis)
    pairs = attribute_parameters(pairs, model, analysis)
    found = [block for block, _ in pairs]
    rejected = [*not_residual, *no_blocks]
    if any(block.refusal for block in found):
        refuse_cache(analysis.output)  # filling the cache may be all that needs the branches
    training = added_in_training(model, run, found, additions, analysis, count_flops)
    if training is not None:
        found, later = finder.with_training(pairs, analysis, training)
        known = {(each.owner, each.location) for each in rejected}
        rejected += [each for each in later if (each.owner, each.location) not in known]
    if not found:
        raise nothing_found(model, example, listed(rejected))
    return Found(found, rejected, routes_of_gradients(pairs, found, analysis))


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


@dataclass(frozen=True, eq=False)
class _Candidate:
    """Additions that share a gate, and the block that they would form.

    Either the methods that add are rewritten, as in `rewritten`, or the calls of `group` are
    deferred.
    """

    name: str
    events: tuple[AdditionEvent, ...]
    additions: tuple[Addition, ...] = ()
    """The additions in the source; empty for a group."""
    rewritten: FoundBlock | None = None
    group: Group | None = None


@dataclass(frozen=True)
class _Finder:
    """Groups the additions of one model into blocks, as the user's settings say."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """All modules of the model, by name."""
    selected: SelectedModules
    granularity: Granularity
    defer: Container[str]
    """Names of blocks to defer even if their source can be rewritten."""

    def blocks(
        self, additions: list[Addition], analysis: Analysis
    ) -> tuple[list[BlockWithEvents], list[Rejected]]:
        """The blocks that `additions` form, in the order of execution; and those that form none."""
        additions, rejected = without_long_skips(additions, self.modules)
        for event in (event for addition in additions for event in addition.events):
            analysis.find_enclosing_call(event)
        additions, sums = without_sums(additions, analysis)
        rejected += sums
        together: dict[tuple[str, Any], list[Addition]] = {}
        for addition in additions:
            key = _block_of(addition, self.modules, self.granularity)
            together.setdefault(key, []).append(addition)
        candidates = [
            self._candidate(name, kept, analysis)
            for (name, _), members in together.items()
            if (kept := outermost(members, analysis))
        ]
        rewritten, deferred = self._divided(candidates, analysis)
        formed = [*rewritten, *self._groups(deferred, analysis)]
        formed = [each for each in formed if not _is_covered(each, formed, analysis)]
        long = _long_skips(formed, analysis)
        for candidate in candidates:
            events = set(candidate.events)
            if any(each.name in long and not events.isdisjoint(each.events) for each in formed):
                reason = f"{LONG_SKIP}other blocks are inside"
                rejected += [rejected_as(addition, reason) for addition in candidate.additions]
        formed = [each for each in formed if each.name not in long]
        blocks = [
            (replace(found, change=analysis.change_of_shortcut(events)), events)
            for found, events in self._assembled(formed, deferred, analysis)
        ]
        return sorted(blocks, key=lambda pair: min(e.total for e in pair[1])), rejected

    def _candidate(self, name: str, additions: list[Addition], analysis: Analysis) -> _Candidate:
        events = tuple(event for addition in additions for event in addition.events)
        rewritten = edited_block(name, additions, self.modules, analysis)
        return _Candidate(name, events, tuple(additions), rewritten)

    def _divided(
        self, candidates: Sequence[_Candidate], analysis: Analysis
    ) -> tuple[list[_Candidate], list[_Candidate]]:
        """The candidates whose methods are rewritten, and those that are deferred."""
        rewritten, deferred = [], []
        for each in candidates:
            (deferred if self._must_be_deferred(each, analysis) else rewritten).append(each)
        while True:  # a deferred addition must keep its position in the source
            events = [event for each in deferred for event in each.events]
            clash = [
                each
                for each in rewritten
                if each.rewritten is not None and clashes(each.rewritten, events)
            ]
            if not clash:
                return rewritten, deferred
            deferred += clash
            rewritten = [each for each in rewritten if each not in clash]

    def _must_be_deferred(self, candidate: _Candidate, analysis: Analysis) -> bool:
        """Whether a candidate must be deferred regardless of the other candidates."""
        found, additions = candidate.rewritten, candidate.additions
        assert found is not None
        if found.refusal:
            return True
        if not found.is_rewritten:
            return False
        in_a_loop = any(_loops(addition.events, analysis) for addition in additions)
        one_by_one = not found.name and len(additions) > 1  # in the forward method of the model
        return found.name in self.defer or in_a_loop or one_by_one

    def _groups(self, deferred: Sequence[_Candidate], analysis: Analysis) -> list[_Candidate]:
        """The additions of the deferred candidates, grouped by gate."""
        events = [event for each in deferred for event in each.events]
        groups = deferred_groups(events, analysis, self.modules)
        if self.granularity == "unit":
            groups = [
                analysis.group(group.block, [e for e in group.events if e.site == site])
                for group in groups
                for site in dict.fromkeys(event.site for event in group.events)
            ]
        return [_Candidate(group.block, group.events, group=group) for group in groups]

    def _assembled(
        self, formed: Sequence[_Candidate], deferred: Sequence[_Candidate], analysis: Analysis
    ) -> list[BlockWithEvents]:
        """The blocks among `formed` that the user has selected, each with its events.

        Args:
            deferred: the candidates from which the groups in `formed` were made.
        """
        blocks: list[BlockWithEvents] = []
        reasons = {
            event: each.rewritten.refusal if each.rewritten else ""
            for each in deferred
            for event in each.events
        }
        for each in formed:
            if each.group is not None:
                if self.selected.allows(each.name, each.group.modules):
                    found = deferred_block(each.group, analysis, self.modules, reasons)
                    blocks.append((found, each.events))
                continue
            found = each.rewritten
            assert found is not None
            if not self.selected.allows(each.additions[0].owner, found.names_in_branch()):
                continue
            if found.is_rewritten:
                share = analysis.group(each.name, each.events).exclusive_share
                if share < MIN_SAVED:
                    found = replace(found, refusal=mostly_shared(share))
            blocks.append((found, each.events))
        found = numbered(block for block, _ in blocks)
        return list(zip(found, (events for _, events in blocks), strict=True))

    def with_training(
        self,
        pairs: Sequence[BlockWithEvents],
        evaluation: Analysis,
        training: InTraining,
    ) -> tuple[list[FoundBlock], list[Rejected]]:
        """The blocks with their additions in training mode, and the blocks that only it runs; and
        the additions of training mode that form no block.

        Args:
            pairs: the blocks found in evaluation mode, each with its events.
        """
        found = []
        for block, events in pairs:
            block = _outside_functions(block, events, training.analysis.functions)
            block = _called_alike(block, evaluation, training.analysis)
            block = as_both_need(block, training.counterparts, training.analysis)
            found.append(with_counterparts(block, training.counterparts))
        new = set(training.new)
        of_block = [
            (_block_of(a, self.modules, self.granularity)[0], replace(a, events=events))
            for a in without_long_skips(training.additions, self.modules)[0]
            if (events := tuple(event for event in a.events if event in new))
        ]
        of_block = [(n, a) for n, a in of_block if not n or self.selected.allows(n, a.modules)]
        rewrite = functools.partial(rewritten_unit, modules=self.modules)
        found, only = with_training_additions(
            found, of_block, training.analysis, self.modules, rewrite
        )
        blocks: list[BlockWithEvents] = []
        rejected = training.rejected
        if only:
            blocks, more = self.blocks(training.additions, training.analysis)
            rejected = [*rejected, *more]
        alone = [block for block, events in blocks if only.issuperset(events)]
        return with_training_only(found, alone, training.analysis), rejected


def _loops(events: Sequence[AdditionEvent], analysis: Analysis) -> bool:
    """Whether an expression adds the branches of several modules, or adds to its own sums."""
    modules = {event.modules for event in events}
    return len(modules) > 1 or any(analysis.iterations(events).values())


def _is_covered(block: _Candidate, blocks: Sequence[_Candidate], analysis: Analysis) -> bool:
    """Whether a block is in the branch of a different block of the same name.

    The gate of that block then covers it. An example is a layer with a residual addition inside,
    whose output the model adds to its input.
    """
    around = [
        other
        for each in blocks
        if each is not block and each.name == block.name
        for other in each.events
    ]
    return all(any(analysis.contains(other, event) for other in around) for event in block.events)


def _long_skips(blocks: Sequence[_Candidate], analysis: Analysis) -> set[str]:
    """Names of the blocks that are long skip connections, or that the same loop makes."""
    long = {each.name for each in blocks if _is_long(each.name, blocks, analysis)}
    loops = {_loop(event) for each in blocks if each.name in long for event in each.events}
    return long | {each.name for each in blocks if loops.issuperset(map(_loop, each.events))}


def _loop(event: AdditionEvent) -> object:
    """A key that is equal for additions by the same expression in the same call of a module."""
    assert event.enclosing is not None
    return event.site, event.enclosing.serial


def _is_long(name: str, blocks: Sequence[_Candidate], analysis: Analysis) -> bool:
    """Whether `name` is a long skip connection: blocks of other modules are in its branch."""
    return any(
        analysis.contains(event, other)
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
    """The name of the block that an addition belongs to, and a key for its gate in the block."""
    if isinstance(modules[addition.owner], Residual):
        return addition.owner, None
    whole = registered_around(addition.owner, modules)
    if granularity == "unit":
        return (addition.owner, addition.edits) if whole is None else (whole, None)
    return repeated_block(whole or addition.owner, modules), None
