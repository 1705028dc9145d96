"""What of a model is a residual block, whoever wrote it."""

import functools
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.additions import Addition, Passed, discover, own_backward
from stochastic_depth.surgery.blocks import (
    Found,
    Granularity,
    branch_modules,
    is_repeated,
    repeated_block,
    residual_block,
)
from stochastic_depth.surgery.branches import LEAST, Analysis, Event, needed
from stochastic_depth.surgery.edits import Site
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.preserve import preserve_state
from stochastic_depth.surgery.select_modules import Choice, Chosen, chosen_modules
from stochastic_depth.surgery.syntax import in_loop
from stochastic_depth.surgery.training_additions import (
    added_in_training,
    joined,
    with_events,
    with_training_only,
)
from stochastic_depth.surgery.ways import (
    clashes,
    deferred_block,
    edited_block,
    registered_around,
    unit_of,
)

CUT = ("slice", "call")
"""The mechanisms by which a method is rewritten."""


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
    passed: list[Passed] | None = None,
) -> list[Found]:
    """The residual blocks of `model`, in the order in which they run on `example`.

    Args:
        defer: names of blocks that are deferred even where their source can be rewritten.
        passed: gets the additions that are not taken, with the reason.
    """
    passed = [] if passed is None else passed
    chosen = chosen_modules(model, include, exclude)
    look = _Look(model, dict(model.named_modules()), chosen, granularity, defer)
    run = caller(model, example)
    with preserve_state(model):
        model.eval()
        additions, analysis = discover(model, run, count_flops, passed)
    taken = look.blocks(additions, analysis, passed)
    found = [block for block, _ in taken]
    if any(block.refusal for block in found):
        refuse_cache(analysis.output)  # which branches fill, and nothing else may need them
    more = added_in_training(model, run, found, additions, analysis, count_flops)
    if more is None:
        return found
    found = [
        with_events(_called_alike(block, analysis, more.analysis), more.again)
        for block in (_outside_functions(*block, more.within) for block in taken)
    ]
    additions, new = _residual_ones(more.additions, look.modules, []), set(more.new)
    of_block = [
        (_block_of(a, look.modules, granularity)[0], replace(a, events=events))
        for a in additions
        if (events := tuple(event for event in a.events if event in new))
    ]
    of_block = [(name, a) for name, a in of_block if not name or chosen.has(name, a.modules)]
    cut = functools.partial(unit_of, modules=look.modules)
    found, alone = joined(found, of_block, more.analysis, look.modules, cut)
    later: list[Passed] = more.passed
    blocks = look.blocks(more.additions, more.analysis, later) if alone else []
    known = {(each.owner, each.place) for each in passed}
    passed += [each for each in later if (each.owner, each.place) not in known]
    return with_training_only(
        found,
        [block for block, events in blocks if alone.issuperset(events)],
        more.analysis,
    )


def _outside_functions(block: Found, events: Sequence[Event], within: Mapping[Site, str]) -> Found:
    """A block, with the reason where training mode adds its branch in an `autograd.Function`."""
    functions = [within[event.site] for event in events if event.site in within]
    return replace(block, refusal=own_backward(functions[0])) if functions else block


def _called_alike(block: Found, evaluation: Analysis, training: Analysis) -> Found:
    """A block, with the reason where training mode calls a deferred one more often."""
    if block.mechanism != "deferred":
        return block
    for name in block.modules:
        before, now = len(evaluation.of(name)), len(training.of(name))
        if now > before:
            why = (
                f"{name!r} of its branch is called {now} times in training mode and {before} in "
                "evaluation: each call has a gate of its own, so both must call it equally often"
            )
            return replace(block, refusal=why)
    return block


@dataclass(frozen=True)
class _Look:
    """What was asked for of one model."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    """By name."""
    chosen: Chosen
    granularity: Granularity
    defer: Container[str]

    def blocks(
        self, additions: list[Addition], analysis: Analysis, passed: list[Passed]
    ) -> list[tuple[Found, tuple[Event, ...]]]:
        """The blocks that `additions` make up, each with its additions as they came."""
        additions = _residual_ones(additions, self.modules, passed)
        for event in (event for addition in additions for event in addition.events):
            analysis.place(event)
        additions = _without_sums(additions, analysis, passed)
        blocks: dict[tuple[str, Any], list[Addition]] = {}
        for addition in additions:
            key = _block_of(addition, self.modules, self.granularity)
            blocks.setdefault(key, []).append(addition)
        edited = [
            (edited_block(name, outermost, self.modules, analysis), outermost)
            for (name, _), group in blocks.items()
            if (outermost := _outermost(group, analysis))
        ]
        return _with_deferred(self, edited, analysis, passed)


def _with_deferred(
    look: _Look,
    edited: list[tuple[Found, list[Addition]]],
    analysis: Analysis,
    passed: list[Passed],
) -> list[tuple[Found, tuple[Event, ...]]]:
    """The blocks, deferred where their source cannot be rewritten."""
    modules, chosen = look.modules, look.chosen
    kept, others = [], []
    for found, group in edited:
        fixed = found.mechanism in ("registered", "Residual")
        repeated = found.name in look.defer or any(len(a.events) > 1 for a in group)
        repeated |= not found.name and len(group) > 1  # written out one by one, as in a trunk
        (others if found.refusal or (repeated and not fixed) else kept).append((found, group))
    while True:  # a method is rewritten, or it is as it was
        events = [event for _, group in others for a in group for event in a.events]
        clash = [clashes(found, events) for found, _ in kept]
        if not any(clash):
            break
        others += [pair for pair, clashes in zip(kept, clash, strict=True) if clashes]
        kept = [pair for pair, clashes in zip(kept, clash, strict=True) if not clashes]
    copies = analysis.recording.works_in_place or any(
        getattr(module, "inplace", False) for module in look.modules.values()
    )
    groups = analysis.blocks(events, lambda name: repeated_block(name, modules))
    if look.granularity == "unit":
        groups = [analysis.group(g.block, [event]) for g in groups for event in g.events]
    events_of = [(found.name, [e for a in group for e in a.events]) for found, group in kept]
    events_of += [(group.block, list(group.events)) for group in groups]
    long = {name for name, _ in events_of if _is_long(name, events_of, analysis)}
    loops = {_round(event) for name, events in events_of if name in long for event in events}
    long |= {name for name, events in events_of if loops.issuperset(map(_round, events))}
    for _, group in edited:
        of_group = {event for addition in group for event in addition.events}
        if any(name in long and of_group.intersection(events) for name, events in events_of):
            passed += [_passed(a, "a long skip connection: other blocks are inside") for a in group]
    first: Counter[str] = Counter()
    reasons = {event: found.refusal for found, group in others for a in group for event in a.events}
    placed = []
    for (found, group), (name, of_found) in zip(kept, events_of, strict=False):
        unit = found.module
        runs = branch_modules(name, unit) if isinstance(unit, Residual) else found.modules
        if chosen.has(group[0].owner, runs) and name not in long:
            own = analysis.group(name, of_found).own if found.mechanism in CUT else 1
            if own < LEAST:
                found = replace(found, refusal=needed(own))
            placed.append((found, tuple(of_found)))
    for group in groups:
        if chosen.has(group.block, group.modules) and group.block not in long:
            found = deferred_block(group, analysis, modules, copies, first, reasons)
            placed.append((found, group.events))
    return sorted(placed, key=lambda pair: min(event.total for event in pair[1]))


def _round(event: Event) -> object:
    """Equal for additions that are made by the same expression, in one call of one module."""
    assert event.home is not None
    return event.site, event.home.serial


def _is_long(name: str, blocks: Sequence[tuple[str, Sequence[Event]]], analysis: Analysis) -> bool:
    """Whether `name` is a long skip connection, with blocks of other modules in its branch."""
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
    additions: list[Addition], modules: Mapping[str, nn.Module], passed: list[Passed]
) -> list[Addition]:
    """Those that make a block of what they are around; the others go to `passed`."""
    names = {addition.owner: repeated_block(addition.owner, modules) for addition in additions}
    kept = []
    for addition in additions:
        if _gathers(addition):
            passed.append(_passed(addition, "it gathers the parts of a sum in a loop"))
            continue
        name = names[addition.owner]
        inside = {names[other] for other in addition.modules if names.get(other, name) != name}
        reason = ""
        if isinstance(modules[addition.owner], Residual) or is_repeated(name, modules):
            pass
        elif len(inside) > 1:
            reason = f"a long skip connection: {len(inside)} other blocks are inside of it"
        elif addition.upsamples:
            reason = "a long skip connection: what is inside of it is scaled down and up again"
        elif not addition.identity and not name and addition.is_last and len(additions) > 1:
            reason = "a sum of two outputs of the model"
        if reason:
            passed.append(_passed(addition, reason))
        else:
            kept.append(addition)
    return kept


def _without_sums(
    additions: list[Addition], analysis: Analysis, passed: list[Passed]
) -> list[Addition]:
    """Those that add a branch, not the trunk to what it was before; the others go to `passed`."""
    totals = {event.total for addition in additions for event in addition.events}
    kept = []
    for addition in additions:
        if all(
            event.added in totals and not analysis.exclusive(event.branch, {event.total})
            for event in addition.events
        ):
            _, edit = addition.edits[0]
            reason = "a sum of hidden states: what it adds is what the next block begins with"
            passed.append(Passed(addition.owner, str(edit or "in a function"), reason))
        else:
            kept.append(addition)
    return kept


def _outermost(additions: list[Addition], analysis: Analysis) -> list[Addition]:
    """Those of one coin that are in no branch of another: the gate of that one covers them.

    Nor is one of which nothing comes, where something comes of others.
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


def _passed(addition: Addition, reason: str) -> Passed:
    _, edit = addition.edits[0]
    return Passed(addition.owner, str(edit or "in a function"), reason)


def _gathers(addition: Addition) -> bool:
    """Whether it sums parts up in a loop, which is no residual unit."""
    _, edit = addition.edits[0]
    if edit is None or addition.identity:
        return False
    if len(addition.events) > 1:  # its shortcut is then what it has summed up by now
        totals = {event.total for event in addition.events}
        return any(event.kept in totals for event in addition.events)
    try:
        return in_loop(edit.place)
    except UnsupportedBlockError:  # whose source is not there
        return False


def _block_of(
    addition: Addition, modules: Mapping[str, nn.Module], granularity: Granularity
) -> tuple[str, Any]:
    """The name of the block that an addition belongs to, and which coin there is its own."""
    if isinstance(modules[addition.owner], Residual):
        return addition.owner, None
    whole = registered_around(addition.owner, modules)
    if granularity == "unit":
        return (addition.owner, addition.edits) if whole is None else (whole, None)
    return repeated_block(whole or addition.owner, modules), None
