"""The branches of the residual additions of a recorded forward pass.

A branch may share values with other parts of the model, such as a condition or a position bias.
These have to be computed even when the block is closed. Only values that nothing but the branch
needs can be skipped.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from stochastic_depth.surgery.addition_functions import Side
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.surgery.record.trace import Call, Recording, calls_during


@dataclass(frozen=True)
class Occurrence:
    """One execution of an expression that adds, as it is recognised in a later pass."""

    site: CallSite
    index: int
    """How often the same expression was evaluated before in the pass."""
    side: Side
    training: bool
    """Whether the pass was in training mode."""


@dataclass(frozen=True, eq=False)
class Execution:
    """One execution of a residual addition, as far as it is known while it happens.

    Values are given by their numbers in the recording.
    """

    shortcut: int
    added: int
    """The result of the branch."""
    total: int
    """The result of the addition."""
    occurrence: Occurrence
    stack: tuple[Call, ...]
    """The running module calls, innermost last."""
    identity: bool
    """Whether the shortcut is the identity; otherwise it is a projection."""
    compiled: bool = False
    """Whether a function that torch.compile compiles makes the addition."""
    branch_in_owner: frozenset[int] = frozenset()
    """The values of the branch that are computed during the call of the owner of the addition."""
    modules: frozenset[str] = frozenset()
    """Names of the modules that the branch calls."""

    @property
    def site(self) -> CallSite:
        return self.occurrence.site

    def branch_within(self, recording: Recording, call: Call) -> frozenset[int]:
        """The values of the branch, back to the inputs of `call`."""
        return recording.reach_without(self.added, self.shortcut, call)


@dataclass(frozen=True, eq=False, kw_only=True)
class AdditionEvent(Execution):
    """One execution of a residual addition, and its branch."""

    enclosing: Call
    """The innermost module call that computes all that only the branch needs."""
    branch: frozenset[int]
    """The values of the branch that are computed during that call."""
    exclusive: Set[int]
    """Those that nothing but this addition needs, which may include sums of other additions. If
    each of two streams is computed from the other, neither is exclusive to the other."""

    def contains(self, total: int) -> bool:
        """Whether nothing but the branch needs a sum, which is made during `enclosing`."""
        return self.enclosing.began <= total and total in self.exclusive


class Analysis:
    """What the values of a recorded forward pass are needed for.

    Args:
        output: the output of the model.
        sites: how often each expression has added two tensors.
        functions: the expressions that add inside an `autograd.Function`, each with the name of
            that function.
        totals: the results of all residual additions.
    """

    def __init__(
        self,
        recording: Recording,
        output: Any,
        sites: Counter[CallSite],
        functions: Mapping[CallSite, str],
        totals: Set[int],
    ) -> None:
        self.recording, self.output = recording, output
        self.sites, self.functions, self.totals = sites, functions, totals
        self.outputs = recording.numbers(output)
        self.alive: set[int] = set()
        """The values that the outputs are computed from."""
        for number in self.outputs:
            if number not in self.alive:
                self.alive |= recording.reach(number)
        self._calls_of: dict[str, list[Call]] = {}
        every = calls_during(recording.outermost, -1, len(recording.values))
        for call in sorted(every, key=lambda call: call.serial):
            self._calls_of.setdefault(call.name, []).append(call)
        self._iteration_of: dict[Call, int] = {}

    def calls_of(self, module: str) -> list[Call]:
        """The calls of a module, by its name."""
        return self._calls_of.get(module, [])

    def event(self, made: Execution) -> AdditionEvent:
        """An execution with its branch, within the innermost call that computes all of it."""
        call = made.stack[-1]
        while True:
            branch = made.branch_within(self.recording, call)
            exclusive = self.exclusive_values(branch, {made.total})
            if call.parent is None or not any(
                value < call.began and made.shortcut in self.recording.reach(value, made.shortcut)
                for value in exclusive
            ):
                known = {"enclosing": call, "branch": branch, "exclusive": exclusive}
                return AdditionEvent(**vars(made), **known)
            call = call.parent

    def exclusive_values(self, branch: Set[int], totals: Set[int]) -> set[int]:
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
