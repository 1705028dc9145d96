"""The values and module calls of a forward pass that belong to the branch of a residual addition.

A branch may share values with other parts of the model, such as a condition or a position bias.
These have to be computed even when the block is closed. Only what the branch alone needs can be
skipped.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from stochastic_depth.surgery.edits import Site
from stochastic_depth.surgery.trace import Call, Recording

MIN_SAVED = 0.5
"""The share of a branch's FLOPs that a closed block must save."""


def mostly_shared(own: float) -> str:
    """The reason to refuse a block whose branch is mostly needed elsewhere.

    Args:
        own: the share of the branch's FLOPs, from 0 to 1, that the addition alone needs.
    """
    return (
        f"most of its branch (about {1 - own:.0%} of its FLOPs) is needed for more than the "
        "addition: an output of the model, or of another block, is computed from it"
    )


@dataclass(eq=False)
class Event:
    """One execution of a residual addition in the recorded forward pass.

    Values are given by their numbers in the recording.
    """

    shortcut: int
    added: int
    """The result of the branch."""
    total: int
    """The result of the addition."""
    side: int
    """Which operand is the shortcut, 0 or 1."""
    site: Site
    occurrence: int
    """How many times the same expression was evaluated before, in this pass."""
    stack: tuple[Call, ...]
    """The module calls around it, the innermost last."""
    identity: bool
    """Whether the shortcut is the identity, not a projection."""
    training: bool = False
    """Whether the pass was in training mode."""
    enclosing: Call | None = None
    """The innermost module call that computes all of the branch; None until `place` has found
    it."""
    branch: set[int] = field(default_factory=set)
    """The values of the branch that are computed during that call."""
    modules: frozenset[str] = frozenset()
    """Names of the modules that ran for its branch."""

    def without_recording(self) -> "Event":
        """This event without the calls that hold the tensors of the recorded pass."""
        return replace(self, stack=(), enclosing=None, branch=set())

    def branch_within(self, recording: Recording, call: Call) -> set[int]:
        """The values of the branch, back to the inputs of `call`."""
        within = recording.reach_within
        return within(self.added, call) - within(self.shortcut, call)


@dataclass(frozen=True)
class Group:
    """The additions that share one gate, and the modules that run for them alone."""

    block: str
    """The name of the block that the additions form."""
    events: tuple[Event, ...]
    owner: Call
    """The module call during which the branches run."""
    calls: tuple[Call, ...]
    """The outermost module calls that run for these additions alone."""
    modules: Counter[str]
    """How often each module runs for them alone, by name."""
    parameters: tuple[str, ...]
    flops: int
    """FLOPs of `calls`, and of the values that are computed from their results, in one forward
    pass."""
    saved: float
    """The share of the branch's multiplications, from 0 to 1, that is saved without `calls` and the
    values computed from their results. Of several additions, the one that saves least counts."""
    own: float
    """The share of the branch's multiplications, from 0 to 1, that the additions alone need."""


class Analysis:
    """Finds the values and modules of a recorded forward pass that belong to each branch.

    Args:
        outputs: the numbers of the values that the model has returned.
        mixes: whether a function, given by name, mixes values; every branch has such a function.
        sites: how often each expression has added two tensors.
    """

    def __init__(
        self,
        recording: Recording,
        outputs: set[int],
        mixes: Callable[[str], bool],
        sites: Counter[Site],
    ) -> None:
        self.recording, self.outputs, self.mixes = recording, outputs, mixes
        self.sites = sites
        self.output: Any = None
        """What the model has returned."""
        self.totals: set[int] = set()
        """The results of all residual additions for which `place` was called."""
        self._inside: dict[Event, set[int]] = {}
        self._turn_of: dict[Call, int] = {}
        self.alive: set[int] = set()
        """The values that the outputs are computed from."""
        for output in outputs:
            if output not in self.alive:
                self.alive |= recording.reach(output)
        self.outputs_of = {call.serial: outputs for call, outputs in recording.finished}
        self.calls_by_name: dict[str, list[Call]] = {}
        for call in sorted((call for call, _ in recording.finished), key=lambda call: call.serial):
            self.calls_by_name.setdefault(call.name, []).append(call)

    def calls_of(self, module: str) -> list[Call]:
        """The calls of a module, by its name."""
        return self.calls_by_name.get(module, [])

    def place(self, event: Event) -> None:
        """Find the innermost call that computes everything that only the branch needs."""
        self.totals.add(event.total)
        for call in reversed(event.stack):
            branch = event.branch_within(self.recording, call)
            own = self.exclusive(branch, {event.total})
            event.enclosing, event.branch = call, branch
            if not any(
                value < call.began and event.shortcut in self.recording.reach(value, event.shortcut)
                for value in own
            ):
                return

    def turns(self, events: Iterable[Event]) -> dict[Event, int]:
        """How many times the same expression must have added before each event can happen.

        Events of one expression with the same number are not computed from each other, like those
        of the two halves of a siamese network.
        """
        found: dict[Event, int] = {}
        of_site: dict[Site, list[Event]] = {}
        highest: Counter[Site] = Counter()
        for event in sorted(events, key=lambda event: event.total):
            before = of_site.setdefault(event.site, [])
            turn = 0
            for first in (before[-1:], before[:1]):  # the last one is most often enough
                if first and turn <= highest[event.site]:
                    reached = self.recording.reach(event.total, first[0].total)
                    turn = max((found[b] + 1 for b in before if b.total in reached), default=0)
            found[event] = turn
            highest[event.site] = max(highest[event.site], turn)
            before.append(event)
        return found

    def turn(self, call: Call) -> int:
        """As `turns`, for a call of a module: how many of its calls must be made before."""
        known = self._turn_of.get(call)
        if known is None:
            before = [other for other in self.calls_of(call.name) if other.ended <= call.began]
            reached: set[int] = set()
            for given in call.inputs if before else ():
                reached |= self.recording.reach(given)
            needed = [c for c in before if not reached.isdisjoint(range(c.began, c.ended))]
            known = max((self.turn(other) + 1 for other in needed), default=0)
            self._turn_of[call] = known
        return known

    def exclusive(self, branch: set[int], totals: set[int]) -> set[int]:
        """The values of `branch` that are needed only to compute the sums `totals`."""
        own: set[int] = set()
        values = self.recording.values
        for value in sorted(branch, reverse=True):
            together = values[value].together or (value,)
            if not self.outputs.isdisjoint(together):
                continue
            children = (child for each in together for child in values[each].children)
            if all(c in totals or c in own or c not in self.alive for c in children):
                own.add(value)
        return own

    def group(self, block: str, events: Sequence[Event]) -> Group:
        """The block of the additions `events`, made in one call or one iteration of a loop."""
        shortcuts = {event.shortcut for event in events}
        branch = set[int]().union(*(event.branch for event in events)) - shortcuts
        own = self.exclusive(branch, {event.total for event in events})
        enclosing = _common([event.enclosing for event in events if event.enclosing is not None])
        calls = [
            (call, outputs)
            for call, outputs in self.recording.finished
            if call.is_within(enclosing)
            and outputs & own
            and all(n in own or n not in self.alive for n in outputs)
        ]
        serials = {call.serial for call, _ in calls}
        outermost = [
            call for call, _ in calls if not any(a.serial in serials for a in call.ancestors())
        ]
        owner = enclosing
        while owner.parent is not None and (
            len(self.calls_by_name.get(owner.name, [])) > 1
            or not all(f"{call.name}.".startswith(f"{owner.name}.") for call in outermost)
        ):  # a module that blocks share may run here, and have its name in another block
            owner = owner.parent
        deferred = {value for call in outermost for value in range(call.began, call.ended)}
        for value in sorted(own):  # a value computed from a placeholder is one too
            if not deferred.isdisjoint(self.recording.values[value].parents):
                deferred.add(value)
        return Group(
            block,
            tuple(events),
            owner,
            tuple(outermost),
            Counter(call.name for call, _ in calls),
            self.parameters(own),
            sum(self.recording.values[value].flops for value in own & deferred),
            self._share(events, deferred),
            self._share(events, own),
        )

    def _share(self, events: Sequence[Event], of: set[int]) -> float:
        """The share of the branch's multiplications, 0 to 1, that compute the values `of`.

        Where two streams feed each other, the branch of one is computed from earlier sums of the
        other. The work that went into these sums belongs to other blocks, and is not counted.
        """
        shares = []
        totals = self.totals - {event.total for event in events}
        for event in events:
            assert event.enclosing is not None
            inside = {value for value in event.branch if value >= event.enclosing.began}
            for total in totals & inside - self.inside(event):
                inside -= self.recording.reach(total, event.enclosing.began)
            for values in (self._from_shortcut(event, inside), inside):
                costs = {value: self._cost(value) for value in values}
                if any(costs.values()):
                    break
            saved = sum(cost for value, cost in costs.items() if value in of)
            shares.append(saved / max(1, sum(costs.values())))
        return min(shares)

    def _from_shortcut(self, event: Event, inside: set[int]) -> set[int]:
        """The values of a branch that are computed from its shortcut.

        Values that are computed from something else, such as the shifts and scales that all blocks
        of a diffusion transformer share, do not count as work of the branch.
        """
        reached = {event.shortcut}
        for value in sorted(inside):
            if not reached.isdisjoint(self.recording.values[value].parents):
                reached.add(value)
        return reached - {event.shortcut}

    def _cost(self, number: int) -> int:
        """About how many multiplications computed a value; 0 where the function does not mix.

        The number is estimated from the shapes of the arguments. For an exact count, PyTorch's
        dispatcher would have to load the compiler, which takes seconds.
        """
        value = self.recording.values[number]
        if not self.mixes(value.made_by):
            return 0
        name, size = value.made_by, value.tensor.numel()
        given = [self.recording.values[parent].tensor for parent in value.parents]
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

    def surrounds(self, event: Event, other: Event) -> bool:
        """Whether everything computed from the sum of `other` is in the branch of `event`."""
        assert event.enclosing is not None
        if (
            not event.enclosing.began <= other.total < event.total
            or other.total not in event.branch
        ):
            return False
        return other.total in self.inside(event)

    def inside(self, event: Event) -> set[int]:
        """The values that are computed for `event` alone, including sums of other additions.

        If each of two streams is computed from the other, neither is inside the other.
        """
        known = self._inside.get(event)
        if known is None:
            known = self._inside[event] = self.exclusive(event.branch, {event.total})
        return known

    def change_of_shortcut(self, events: Iterable[Event]) -> str:
        """How a module of a branch changes the shortcut in place; empty if none does."""
        for event in events:
            assert event.enclosing is not None
            for change in self.recording.changes(event.shortcut):
                around = [change.call, *change.call.ancestors()] if change.call else []
                inside = (
                    around[: around.index(event.enclosing)] if event.enclosing in around else []
                )
                if any(call.name in event.modules for call in inside):
                    return _in_place(inside[0], change.function)
        return ""

    def flops(self, events: Iterable[Event]) -> int:
        """FLOPs of the branches of `events`; a function that several of them use counts once."""
        branch = set[int]().union(*(event.branch for event in events))
        return sum(self.recording.values[value].flops for value in branch)

    def parameters(self, own: set[int]) -> tuple[str, ...]:
        """Names of the parameters from which the values `own` were computed."""
        parents = {p for value in own for p in self.recording.values[value].parents}
        return tuple(sorted(self.recording.parameters(own | parents)))


def _in_place(call: Call, function: str) -> str:
    """The reason why a block whose branch changes its shortcut cannot be closed, and the remedy."""
    flag = "give it inplace=False, or " if getattr(call.module, "inplace", False) else ""
    return (
        f"its branch changes its shortcut in place, in {call.name!r} "
        f"({type(call.module).__name__}, {function}), which a closed block does not run: {flag}"
        "write x + f(x.clone())"
    )


def _common(calls: Sequence[Call]) -> Call:
    """The innermost call during which all of `calls` are made."""
    first = calls[0]
    while not all(call is first or call.is_within(first) for call in calls):
        assert first.parent is not None
        first = first.parent
    return first
