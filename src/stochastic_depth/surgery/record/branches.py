"""The values and module calls of a forward pass that belong to the branch of a residual addition.

A branch may share values with other parts of the model, such as a condition or a position bias.
These have to be computed even when the block is closed. Only values that nothing but the branch
needs can be skipped.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from stochastic_depth.block import Route
from stochastic_depth.surgery.addition_functions import Side
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.surgery.record.trace import Call, Recording

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


@dataclass(eq=False)
class AdditionEvent:
    """One execution of a residual addition in the recorded forward pass.

    Values are given by their numbers in the recording.
    """

    shortcut: int
    added: int
    """The result of the branch."""
    total: int
    """The result of the addition."""
    side: Side
    site: CallSite
    occurrence: int
    """How often the same expression was evaluated before in this pass."""
    stack: tuple[Call, ...]
    """The running module calls, innermost last."""
    identity: bool
    """Whether the shortcut is the identity; otherwise it is a projection."""
    training: bool = False
    """Whether the pass was in training mode."""
    enclosing: Call | None = None
    """The innermost module call that computes all of the branch. `Analysis.find_enclosing_call`
    sets it."""
    branch: set[int] = field(default_factory=set)
    """The values of the branch that are computed during that call; before it is known, during the
    call of the owner of the addition."""
    modules: frozenset[str] = frozenset()
    """Names of the modules that the branch calls."""

    def without_recording(self) -> "AdditionEvent":
        """This event without the calls that hold the tensors of the recorded pass."""
        return replace(self, stack=(), enclosing=None, branch=set())

    def branch_within(self, recording: Recording, call: Call) -> set[int]:
        """The values of the branch, back to the inputs of `call`."""
        within = recording.reach_within
        return within(self.added, call) - within(self.shortcut, call)


@dataclass(frozen=True)
class Group:
    """Additions that share one gate, and the module calls that nothing else needs."""

    block: str
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


class Analysis:
    """Finds the values and modules of a recorded forward pass that belong to each branch.

    Args:
        outputs: the numbers of the values that the model has returned.
        mixes: whether a function, given by name, mixes values; every branch calls such a function.
        sites: how often each expression has added two tensors.
        functions: the expressions that add inside an `autograd.Function`, each with the name of
            that function.
    """

    def __init__(
        self,
        recording: Recording,
        outputs: set[int],
        mixes: Callable[[str], bool],
        sites: Counter[CallSite],
        functions: Mapping[CallSite, str],
    ) -> None:
        self.recording, self.outputs, self.mixes = recording, outputs, mixes
        self.sites, self.functions = sites, functions
        self.output: Any = None
        """The output of the model."""
        self.totals: set[int] = set()
        """The results of the additions for which `find_enclosing_call` was called."""
        self._exclusive_to: dict[AdditionEvent, set[int]] = {}
        self._iteration_of: dict[Call, int] = {}
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

    def find_enclosing_call(self, event: AdditionEvent) -> None:
        """Set `event.enclosing` to the innermost call that computes all that only the branch needs,
        and `event.branch` to the values of the branch within that call."""
        self.totals.add(event.total)
        for call in reversed(event.stack):
            branch = event.branch_within(self.recording, call)
            event.enclosing, event.branch = call, branch
            if not any(
                value < call.began and event.shortcut in self.recording.reach(value, event.shortcut)
                for value in self.exclusive_values(branch, {event.total})
            ):
                return

    def iterations(self, events: Iterable[AdditionEvent]) -> dict[AdditionEvent, int]:
        """For each event, the number of its iteration in a loop, from 0.

        It is the number of earlier additions by the same expression that the event depends on, one
        through the other. Events of one expression with the same number do not depend on each
        other, like those of the two halves of a siamese network.
        """
        found: dict[AdditionEvent, int] = {}
        of_site: dict[CallSite, list[AdditionEvent]] = {}
        highest: Counter[CallSite] = Counter()
        for event in sorted(events, key=lambda event: event.total):
            before = of_site.setdefault(event.site, [])
            iteration = 0
            for first in (before[-1:], before[:1]):  # the last one is most often enough
                if first and iteration <= highest[event.site]:
                    reached = self.recording.reach(event.total, first[0].total)
                    iteration = max((found[b] + 1 for b in before if b.total in reached), default=0)
            found[event] = iteration
            highest[event.site] = max(highest[event.site], iteration)
            before.append(event)
        return found

    def iteration(self, call: Call) -> int:
        """The number of earlier calls of its module that a call depends on; see `iterations`."""
        known = self._iteration_of.get(call)
        if known is None:
            before = [other for other in self.calls_of(call.name) if other.ended <= call.began]
            reached: set[int] = set()
            for given in call.inputs if before else ():
                reached |= self.recording.reach(given)
            needed = [c for c in before if not reached.isdisjoint(range(c.began, c.ended))]
            known = max((self.iteration(other) + 1 for other in needed), default=0)
            self._iteration_of[call] = known
        return known

    def exclusive_values(self, branch: set[int], totals: set[int]) -> set[int]:
        """The values of `branch` that only the sums `totals` need."""
        exclusive: set[int] = set()
        values = self.recording.values
        for value in sorted(branch, reverse=True):
            together = values[value].together or (value,)
            if not self.outputs.isdisjoint(together):
                continue
            children = (child for each in together for child in values[each].children)
            if all(c in totals or c in exclusive or c not in self.alive for c in children):
                exclusive.add(value)
        return exclusive

    def group(self, block: str, events: Sequence[AdditionEvent]) -> Group:
        """Group the additions `events`, which are made in one call or one iteration of a loop."""
        shortcuts = {event.shortcut for event in events}
        branch = set[int]().union(*(event.branch for event in events)) - shortcuts
        exclusive = self.exclusive_values(branch, {event.total for event in events})
        enclosing = _common([event.enclosing for event in events if event.enclosing is not None])
        calls = [
            (call, outputs)
            for call, outputs in self.recording.finished
            if call.is_within(enclosing)
            and outputs & exclusive
            and all(n in exclusive or n not in self.alive for n in outputs)
        ]
        serials = {call.serial for call, _ in calls}
        outermost = [
            call for call, _ in calls if not any(a.serial in serials for a in call.ancestors())
        ]
        owner = enclosing
        while owner.parent is not None and (
            len(self.calls_by_name.get(owner.name, [])) > 1
            or not all(f"{call.name}.".startswith(f"{owner.name}.") for call in outermost)
        ):  # a module that blocks share may run here, and have its name in a different block
            owner = owner.parent
        deferred = {value for call in outermost for value in range(call.began, call.ended)}
        for value in sorted(exclusive):  # a value computed from a placeholder is one too
            if not deferred.isdisjoint(self.recording.values[value].parents):
                deferred.add(value)
        return Group(
            block,
            tuple(events),
            owner,
            tuple(outermost),
            Counter(call.name for call, _ in calls),
            self.parameters(exclusive),
            sum(self.recording.values[value].flops for value in exclusive & deferred),
            self._share(events, deferred),
            self._share(events, exclusive),
        )

    def _share(self, events: Sequence[AdditionEvent], computed: set[int]) -> float:
        """The share of a branch's multiplications, 0 to 1, that compute the values `computed`.

        If two streams feed each other, the branch of one is computed from earlier sums of the
        other. The work for these sums belongs to other blocks, and is not counted.

        Returns:
            The smallest share of any of the branches.
        """
        shares = []
        totals = self.totals - {event.total for event in events}
        for event in events:
            assert event.enclosing is not None
            inside = {value for value in event.branch if value >= event.enclosing.began}
            for total in totals & inside - self.exclusive_to(event):
                inside -= self.recording.reach(total, event.enclosing.began)
            for values in (self._from_shortcut(event, inside), inside):
                costs = {value: self._cost(value) for value in values}
                if any(costs.values()):
                    break
            saved = sum(cost for value, cost in costs.items() if value in computed)
            shares.append(saved / max(1, sum(costs.values())))
        return min(shares)

    def _from_shortcut(self, event: AdditionEvent, inside: set[int]) -> set[int]:
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
        """About how many multiplications computed a value; 0 if the function does not mix.

        The number is estimated from the shapes of the arguments. An exact count would need a
        dispatch mode, which loads PyTorch's compiler and takes seconds.
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

    def contains(self, event: AdditionEvent, other: AdditionEvent) -> bool:
        """Whether nothing but the branch of `event` needs the sum of `other`."""
        assert event.enclosing is not None
        if (
            not event.enclosing.began <= other.total < event.total
            or other.total not in event.branch
        ):
            return False
        return other.total in self.exclusive_to(event)

    def exclusive_to(self, event: AdditionEvent) -> set[int]:
        """The values that nothing but `event` needs, which may include sums of other additions.

        If each of two streams is computed from the other, neither is exclusive to the other.
        """
        known = self._exclusive_to.get(event)
        if known is None:
            known = self._exclusive_to[event] = self.exclusive_values(event.branch, {event.total})
        return known

    def change_of_shortcut(self, events: Iterable[AdditionEvent]) -> str:
        """How a module in a branch changes the shortcut in place; empty if none does."""
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

    def flops(self, events: Iterable[AdditionEvent]) -> int:
        """FLOPs of the branches of `events`; a function that several branches use counts once."""
        branch = set[int]().union(*(event.branch for event in events))
        return sum(self.recording.values[value].flops for value in branch)

    def parameters(self, values: set[int]) -> tuple[str, ...]:
        """Names of the parameters from which `values` were computed."""
        return tuple(sorted(self.recording.parameters(values)))

    def routes(self, branch_of: Mapping[tuple[int, int], int]) -> dict[int, Route]:
        """For each value that an output depends on, how gradients come to it.

        Args:
            branch_of: the numbers of blocks, by the result of their branch and the sum.
        """
        found: dict[int, Route] = {}
        for number in sorted(self.alive, reverse=True):  # what is computed from a value comes later
            directly, branches = number in self.outputs, set[int]()
            for child in self.recording.values[number].children:
                block = branch_of.get((number, child))
                if block is not None:
                    branches.add(block)
                elif child in found:
                    directly |= found[child].directly
                    branches |= found[child].branches
            found[number] = Route(directly, frozenset(branches))
        return found

    def users_of_parameters(self) -> dict[str, set[int]]:
        """The values on which outputs depend and that are computed from each parameter directly.

        Parameters that nothing is computed from are left out.
        """
        users = self.recording.users_of_parameters()
        return {name: values & self.alive for name, values in users.items() if values}


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
