"""Decide which additions of a forward pass form residual blocks, and why the others do not."""

from collections.abc import Mapping, Sequence

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import is_repeated, repeated_block
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis
from stochastic_depth.surgery.record.rejected import COUPLING, Rejected
from stochastic_depth.surgery.rewrite.syntax import in_loop

LONG_SKIP = "a long skip connection: "
HIDDEN_STATES = (
    "a sum of hidden states: it adds a hidden state that is already the input of the next block"
)


def without_long_skips(
    additions: list[Addition], modules: Mapping[str, nn.Module]
) -> tuple[list[Addition], list[Rejected]]:
    """The additions that may form a block, and the others."""
    names = {addition.owner: repeated_block(addition.owner, modules) for addition in additions}
    kept, rejected = [], []
    for addition in additions:
        if _accumulates(addition):
            rejected.append(rejected_as(addition, "it accumulates the terms of a sum in a loop"))
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
            reason = f"{LONG_SKIP}{inside} other blocks are inside it"
        elif addition.upsamples:
            reason = f"{LONG_SKIP}its branch makes values smaller and then larger again"
        elif not addition.identity and not name and addition.is_last and len(additions) > 1:
            reason = "a sum of two outputs of the model"
        if reason:
            rejected.append(rejected_as(addition, reason))
        else:
            kept.append(addition)
    return kept, rejected


def without_sums(additions: list[Addition]) -> tuple[list[Addition], list[Rejected]]:
    """The additions that add a branch; and the others, sums of streams or hidden states."""
    events = {event.total: event for addition in additions for event in addition.events}
    streams = {event.total for a in additions if a.identity for event in a.events}
    kept, rejected = [], []
    for addition in additions:
        if addition.coupled is not None:
            coupled = events.get(addition.coupled)
            if coupled is None:
                rejected.append(rejected_as(addition, COUPLING))
                continue
            if all(coupled.contains(event.total) for event in addition.events):
                reason = "a bias: its sum is used only in the branch of a different block"
                rejected.append(rejected_as(addition, reason))
                continue
        joins = any(not event.branch.isdisjoint(streams) for event in addition.events)
        if joins and not addition.identity and not addition.owner:
            reason = "a sum of two streams, one of which has its own residual blocks"
            rejected.append(rejected_as(addition, reason))
        elif all(event.added in events and not event.exclusive for event in addition.events):
            rejected.append(rejected_as(addition, HIDDEN_STATES))
        else:
            kept.append(addition)
    return kept, rejected


def outermost(events: Sequence[AdditionEvent], analysis: Analysis) -> list[AdditionEvent]:
    """The events under one gate that are not in the branch of a different one of them.

    An addition in a branch is skipped with that branch. Events whose sum no output needs are left
    out, unless there are no others. The last block, for example, may add to a second stream that
    nothing reads.
    """
    events = [event for event in events if event.total in analysis.alive] or list(events)
    inside = set[int]().union(*(event.exclusive for event in events))
    return [event for event in events if event.total not in inside]


def rejected_as(addition: Addition, reason: str) -> Rejected:
    _, edit = addition.edits[0]
    return Rejected(addition.owner, str(edit or "in a function"), reason)


def _accumulates(addition: Addition) -> bool:
    """Whether an addition accumulates the terms of a sum in a loop, so that it is not residual."""
    _, edit = addition.edits[0]
    if edit is None or addition.identity:
        return False
    if len(addition.events) > 1:  # the shortcut of each is then the sum so far
        totals = {event.total for event in addition.events}
        return any(event.shortcut in totals for event in addition.events)
    try:
        return in_loop(edit.location)
    except UnsupportedBlockError:  # its source is missing
        return False
