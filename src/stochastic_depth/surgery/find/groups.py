"""The module calls that only the additions under one gate need, and the work that they do."""

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import nn

from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis
from stochastic_depth.surgery.record.shortcuts import is_mixing
from stochastic_depth.surgery.record.trace import Call, Recording, calls_during

MIN_SAVED = 0.5
"""The share of a branch's FLOPs that a closed block must save."""


def mostly_shared(exclusive: float) -> str:
    """The reason to refuse a block whose branch is mostly needed elsewhere.

    Args:
        exclusive: the share of the branch's FLOPs, from 0 to 1, that only the addition needs.
    """
    return (
        f"most of its branch (about {1 - exclusive:.0%} of its FLOPs) is needed for more than the "
        "addition: an output of the model, or of a different block, is computed from it"
    )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Additions that share one gate, and the module calls that nothing else needs."""

    name: str
    """The name of the block that the additions form."""
    events: tuple[AdditionEvent, ...]
    owner: Call
    """The module call during which the branches run."""
    calls: tuple[Call, ...]
    """The outermost module calls that only these additions need."""
    modules: Counter[str]
    """How often each module is called for these additions only, by name."""
    parameters: tuple[str, ...]
    flops: int
    """FLOPs, in one forward pass, of `calls` and of the values computed from their results."""
    saved_share: float
    """The share of the branch's multiplications, from 0 to 1, that is saved if `calls` are not
    made. It is the smallest share of any of the additions."""
    exclusive_share: float
    """The share of the branch's multiplications, from 0 to 1, that only the additions need."""


def group_of(name: str, events: Sequence[AdditionEvent], analysis: Analysis) -> Group:
    """Group the additions `events`, which are made in one call or one iteration of a loop."""
    recording = analysis.recording
    exclusive, enclosing = only_needed(events, analysis), _common([e.enclosing for e in events])
    calls = _calls_for(exclusive, enclosing, max(event.total for event in events), analysis)
    outermost = _outermost(calls)
    owner = enclosing
    while owner.parent is not None and (
        len(analysis.calls_of(owner.name)) > 1
        or not all(f"{call.name}.".startswith(f"{owner.name}.") for call in outermost)
    ):  # a module that blocks share may run here, and have its name in a different block
        owner = owner.parent
    deferred = {value for call in outermost for value in range(call.began, call.ended)}
    for value in sorted(exclusive):  # a value computed from a placeholder is one too
        if not deferred.isdisjoint(recording.values[value].parents):
            deferred.add(value)
    return Group(
        name=name,
        events=tuple(events),
        owner=owner,
        calls=outermost,
        modules=Counter(call.name for call in calls),
        parameters=tuple(sorted(recording.parameters(exclusive))),
        flops=sum(recording.values[value].flops for value in exclusive & deferred),
        saved_share=_share(events, deferred, analysis),
        exclusive_share=_share(events, exclusive, analysis),
    )


def own_calls(event: AdditionEvent, analysis: Analysis) -> tuple[Call, ...]:
    """The outermost module calls that only one addition needs."""
    return _outermost(_calls_for(event.exclusive, event.enclosing, event.total, analysis))


def only_needed(events: Sequence[AdditionEvent], analysis: Analysis) -> Set[int]:
    """The values of the branches of `events` that only these additions need."""
    if len(events) == 1:
        return events[0].exclusive
    shortcuts = {event.shortcut for event in events}
    branch = set[int]().union(*(event.branch for event in events)) - shortcuts
    return analysis.exclusive_values(branch, {event.total for event in events})


def _calls_for(exclusive: Set[int], around: Call, last: int, analysis: Analysis) -> list[Call]:
    """The calls within `around` that give only values of `exclusive`, or ones that nothing needs.

    Args:
        last: the last value that may be computed from `exclusive`.
    """
    return [
        call
        for call in calls_during(around.children, min(exclusive, default=last), last)
        if call.outputs & exclusive
        and all(n in exclusive or n not in analysis.alive for n in call.outputs)
    ]


def _outermost(calls: Sequence[Call]) -> tuple[Call, ...]:
    known = set(calls)
    return tuple(call for call in calls if known.isdisjoint(call.ancestors()))


def _common(calls: Sequence[Call]) -> Call:
    """The innermost call during which all of `calls` are made."""
    first = calls[0]
    while not all(call is first or call.is_within(first) for call in calls):
        assert first.parent is not None
        first = first.parent
    return first


def _share(events: Sequence[AdditionEvent], computed: Set[int], analysis: Analysis) -> float:
    """The share of a branch's multiplications, 0 to 1, that compute the values `computed`.

    If two streams feed each other, the branch of one is computed from earlier sums of the
    other. The work for these sums belongs to other blocks, and is not counted.

    Returns:
        The smallest share of any of the branches.
    """
    shares = []
    recording = analysis.recording
    own = {event.total for event in events}
    for event in events:
        began = event.enclosing.began
        inside = {value for value in event.branch if value >= began}
        for total in (analysis.totals & inside) - event.exclusive - own:
            inside -= recording.reach(total, began)
        for values in (_from_shortcut(event, inside, recording), inside):
            costs = {value: _cost(value, recording) for value in values}
            if any(costs.values()):  # otherwise what mixes is not computed from the shortcut
                break
        saved = sum(cost for value, cost in costs.items() if value in computed)
        shares.append(saved / max(1, sum(costs.values())))
    return min(shares)


def _from_shortcut(event: AdditionEvent, inside: Set[int], recording: Recording) -> Set[int]:
    """The values of a branch that are computed from its shortcut.

    Values that are computed from something else, such as the shifts and scales that all blocks
    of a diffusion transformer share, do not count as work of the branch.
    """
    reached = {event.shortcut}
    for value in sorted(inside):
        if not reached.isdisjoint(recording.values[value].parents):
            reached.add(value)
    return reached - {event.shortcut}


def _cost(number: int, recording: Recording) -> int:
    """About how many multiplications computed a value; 0 if the function does not mix.

    The number is estimated from the shapes of the arguments. An exact count would need a
    dispatch mode, which loads PyTorch's compiler and takes seconds.
    """
    value = recording.values[number]
    if not is_mixing(value.made_by):
        return 0
    name, size = value.made_by, value.tensor.numel()
    given = [recording.values[parent].tensor for parent in value.parents]
    if any(part in name for part in ("lstm", "gru", "rnn")):
        rows = size // max(1, value.tensor.shape[-1])
        return rows * sum(t.numel() for t in given if isinstance(t, nn.Parameter))
    if any(part in name for part in ("conv", "linear")) and len(given) > 1 and given[1].ndim:
        return size * (given[1].numel() // max(1, given[1].shape[0]))
    if "attention" in name and len(given) > 2:
        return 2 * given[0].numel() * given[1].shape[-2]
    if name.startswith(("add", "baddbmm")):
        given = given[1:]
    if "pool" in name or not given or not given[0].ndim:
        return size
    return size * given[0].shape[-1]
