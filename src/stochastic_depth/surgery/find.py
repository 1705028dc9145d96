"""The residual blocks of a model, whoever wrote it, and how each addition is made skippable."""

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.adapters import registered
from stochastic_depth.surgery.additions import Addition, Passed, discover
from stochastic_depth.surgery.blocks import (
    Found,
    Granularity,
    Unit,
    is_repeated,
    repeated_block,
    residual_block,
)
from stochastic_depth.surgery.branches import LEAST, NEEDED, Analysis, Event, Group
from stochastic_depth.surgery.edits import Argument, Edit, Opaque, Registered, Sliced, Sum
from stochastic_depth.surgery.example import Example, caller
from stochastic_depth.surgery.install import gated_class
from stochastic_depth.surgery.preserve import preserve_state
from stochastic_depth.surgery.rewrite import skipped_when_closed
from stochastic_depth.surgery.select_modules import Choice, Chosen, chosen_modules
from stochastic_depth.surgery.syntax import in_loop
from stochastic_depth.surgery.training_additions import added_in_training, joined


def edits_of(
    addition: Addition, modules: Mapping[str, nn.Module], alone: bool
) -> tuple[tuple[nn.Module, Edit], ...]:
    """Where the modules get the gate of `addition`, the one that adds first.

    Args:
        modules: by name.
        alone: whether it is the only addition of its owner.

    Raises:
        UnsupportedBlockError: when there is no way; says what was tried.
    """
    whole = registered_around(addition.owner, modules)
    if whole is not None:
        forward = registered(type(modules[whole]))
        assert forward is not None
        return ((modules[whole], Registered(forward)),)
    try:
        return _sliced(addition, modules)
    except UnsupportedBlockError as error:
        if addition.whole and alone:
            return ((modules[addition.owner], Opaque()),)
        raise UnsupportedBlockError(
            f"{error}; nor can it be skipped as a whole, because it is more than its input plus "
            "one branch"
        ) from error


def _sliced(
    addition: Addition, modules: Mapping[str, nn.Module]
) -> tuple[tuple[nn.Module, Edit], ...]:
    if addition.begins_elsewhere:
        raise UnsupportedBlockError("its branch begins outside of the model's modules")
    edits: list[tuple[nn.Module, Edit]] = []
    skips = False
    for name, edit in addition.edits:
        mine: list[Sliced]
        if edit is None:
            raise UnsupportedBlockError(
                f"its addition is not in a method of {type(modules[name]).__name__}, but in a "
                "function that one calls"
            )
        mine = [edit]
        calls, unused = skipped_when_closed(edit)
        skips |= calls
        for outer in edit.callers:  # which may compute the branch for the method they call
            if not unused:
                break
            mine.append(Argument(outer.place, unused, outer.dead))
            calls, unused = skipped_when_closed(mine[-1])
            skips |= calls
        gated_class(type(modules[name]), tuple(mine), False, False, "")
        edits += [(modules[name], each) for each in mine]
    if not skips:
        raise UnsupportedBlockError(
            f"{edits[0][1]}: the model needs all of its branch for other things too"
        )
    return tuple(edits)


def registered_around(owner: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The nearest module, from `owner` outwards, of a registered class."""
    name = owner
    while name and registered(type(modules[name])) is None:
        name = name.rpartition(".")[0]
    return name or None


def find_residuals(model: nn.Module, include: Choice | None, exclude: Choice) -> list[Found]:
    """The `Residual` units of `model`, in order of registration."""
    chosen = chosen_modules(model, include, exclude)
    return [
        residual_block(name, module, 0)
        for name, module in model.named_modules()
        if isinstance(module, Residual) and chosen.has(name, _inside(name, module))
    ]


def _inside(name: str, module: Residual) -> list[str]:
    """Names of the modules of a unit's branch."""
    branch = f"{name}.branch" if name else "branch"
    return [inner for inner, _ in module.branch.named_modules(prefix=branch)]


def find_blocks(
    model: nn.Module,
    example: Example,
    granularity: Granularity,
    include: Choice | None,
    exclude: Choice,
    count_flops: bool = False,
    defer: Container[str] = frozenset(),
    passed: list[Passed] | None = None,
) -> list[Found]:
    """The residual blocks of `model`, in the order in which they run on `example`.

    Args:
        defer: names of blocks that are deferred even where their source can be rewritten.
        passed: gets the additions that are not taken, with the reason.
    """
    chosen = chosen_modules(model, include, exclude)
    modules = dict(model.named_modules())
    with preserve_state(model):
        model.eval()
        additions, analysis = discover(model, caller(model, example), count_flops, passed)
    passed = [] if passed is None else passed
    additions = _residual_ones(additions, modules, passed)
    for event in (event for addition in additions for event in addition.events):
        analysis.place(event)
    additions = _without_sums(additions, analysis, passed)
    blocks: dict[tuple[str, Any], list[Addition]] = {}
    for addition in additions:
        key = _block_of(addition, modules, granularity)
        blocks.setdefault(key, []).append(addition)
    edited = [
        (_found(name, outermost, modules), outermost)
        for (name, _), group in blocks.items()
        if (outermost := _outermost(group, analysis))
    ]
    found = _with_deferred(model, edited, analysis, modules, chosen, granularity, defer, passed)
    more = added_in_training(model, caller(model, example), found, analysis.sites)
    if more is None:
        return found
    additions = _residual_ones(more[0], modules, passed)
    of_block = [(_block_of(a, modules, granularity)[0], a) for a in additions]
    of_block = [(name, a) for name, a in of_block if not name or chosen.has(name, a.modules)]
    cut = functools.partial(_unit, modules=modules)
    return joined(found, of_block, more[1], modules, cut, passed)


def _with_deferred(
    model: nn.Module,
    edited: list[tuple[Found, list[Addition]]],
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
    chosen: Chosen,
    granularity: Granularity,
    defer: Container[str],
    passed: list[Passed],
) -> list[Found]:
    """The blocks, deferred where their source cannot be rewritten."""
    kept, others = [], []
    for found, group in edited:
        fixed = found.mechanism in ("registered", "Residual")
        repeated = found.name in defer or any(len(a.events) > 1 for a in group)
        repeated |= not found.name and len(group) > 1  # written out one by one, as in a trunk
        (others if found.refusal or (repeated and not fixed) else kept).append((found, group))
    while True:  # a method is rewritten, or it is as it was
        events = [event for _, group in others for a in group for event in a.events]
        clash = [_clashes(found, events) for found, _ in kept]
        if not any(clash):
            break
        others += [pair for pair, clashes in zip(kept, clash, strict=True) if clashes]
        kept = [pair for pair, clashes in zip(kept, clash, strict=True) if not clashes]
    copies = analysis.recording.works_in_place or any(
        getattr(module, "inplace", False) for module in model.modules()
    )
    groups = analysis.blocks(events, lambda name: repeated_block(name, modules))
    if granularity == "unit":
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
        runs = _inside(name, unit) if isinstance(unit, Residual) else found.modules
        if chosen.has(group[0].owner, runs) and name not in long:
            if found.mechanism in ("slice", "call") and analysis.group(name, of_found).own < LEAST:
                found = replace(found, refusal=NEEDED)
            placed.append((min(event.total for event in of_found), found))
    for group in groups:
        if chosen.has(group.block, group.modules) and group.block not in long:
            found = _deferred(group, analysis, modules, copies, first, reasons)
            placed.append((min(event.total for event in group.events), found))
    return [found for _, found in sorted(placed, key=lambda pair: pair[0])]


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


def _clashes(found: Found, events: Sequence[Event]) -> bool:
    """Whether rewriting the methods of `found` would move one of the additions `events`."""
    for unit in found.units:
        for module, edit in unit.edits:
            if isinstance(edit, Sliced):
                code = inspect.unwrap(vars(edit.place.kind)[edit.place.method]).__code__
                if any(
                    event.site[:2] == (code.co_filename, code.co_qualname)
                    and any(call.module is module for call in event.stack)
                    for event in events
                ):
                    return True
    return False


def _deferred(
    group: Group,
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
    copies: bool,
    first: Counter[str],
    reasons: Mapping[Event, str],
) -> Found:
    owner = group.owner.name
    units: tuple[Unit, ...] = ()
    refusal = ""
    try:
        edits = analysis.edits(group, copies, first[owner])
        first[owner] += len(edits)
        units = tuple(
            Unit(((modules[owner], edit),), (), (event,), frozenset(group.modules))
            for edit, event in zip(edits, group.events, strict=True)
        )
    except UnsupportedBlockError as error:
        before = next(filter(None, (reasons[event] for event in group.events)), "")
        refusal = f"{before}; nor can it be deferred: {error}" if before else str(error)
    shortcuts = dict.fromkeys("identity" if e.identity else "projection" for e in group.events)
    return Found(
        group.block,
        modules[group.block],
        ", ".join(shortcuts),
        units,
        group.modules,
        group.parameters,
        group.flops,
        refusal,
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
    """Those of one coin that are in no branch of another: the gate of that one covers them."""
    inner = {event: analysis.inside(event) for a in additions for event in a.events}
    return [
        addition
        for addition in additions
        if not all(
            any(event.total in inner[e] for a in additions if a is not addition for e in a.events)
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
    try:
        return in_loop(edit.place)
    except UnsupportedBlockError:  # whose source is not there
        return len(addition.events) > 1


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


def _found(name: str, additions: list[Addition], modules: Mapping[str, nn.Module]) -> Found:
    module = modules[name]
    if isinstance(module, Residual):
        return residual_block(name, module, sum(a.flops for a in additions))
    units: dict[Any, Unit] = {}
    refusal = ""
    of_owner = Counter(addition.owner for addition in additions)
    for addition in additions:
        try:
            edits = edits_of(addition, modules, of_owner[addition.owner] == 1)
        except UnsupportedBlockError as error:
            refusal = refusal or str(error)
            continue
        before = units.get(edits) or Unit(edits, ())
        units[edits] = replace(
            before,
            additions=before.additions + _stands(addition, modules),
            modules=before.modules | frozenset(addition.modules),
        )
    return Found(
        name,
        module,
        ", ".join(dict.fromkeys("identity" if a.identity else "projection" for a in additions)),
        tuple(units.values()),
        functools.reduce(operator.or_, (Counter(a.modules) for a in additions)),
        tuple(sorted(frozenset[str]().union(*(a.parameters for a in additions)))),
        sum(a.flops for a in additions),
        refusal,
    )


def _unit(addition: Addition, modules: Mapping[str, nn.Module]) -> Unit:
    """An addition whose methods are rewritten.

    Raises:
        UnsupportedBlockError: when they cannot be.
    """
    edits = edits_of(addition, modules, alone=False)
    return Unit(edits, _stands(addition, modules), modules=frozenset(addition.modules))


def _stands(
    addition: Addition, modules: Mapping[str, nn.Module]
) -> tuple[tuple[nn.Module, Sum], ...]:
    name, edit = addition.edits[0]
    return ((modules[name], edit),) if isinstance(edit, Sum) else ()
