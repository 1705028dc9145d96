"""Which values and modules belong to the branch of a residual addition alone."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.edits import Calls, Deferred, Site
from stochastic_depth.surgery.trace import Call, Recording

LEAST = 0.5
"""The share of a branch's FLOPs that a closed block must save."""


def needed(own: float) -> str:
    """Why a block with too small an own share of its branch, from 0 to 1, is not skipped."""
    return (
        f"most of its branch is needed for more than what is added (about {1 - own:.0%} of its "
        "FLOPs): an output of the model, or of another block, is computed from it"
    )


@dataclass(eq=False)
class Event:
    """One residual addition of the watched forward pass."""

    kept: int
    added: int
    total: int
    side: int
    site: Site
    occurrence: int
    """How many additions the same expression has made before, in this pass."""
    stack: tuple[Call, ...]
    identity: bool
    training: bool = False
    """Whether the pass was one in training mode."""
    home: Call | None = None
    """The innermost call within which its branch runs."""
    branch: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Group:
    """The additions that share a gate, as one block."""

    block: str
    events: tuple[Event, ...]
    owner: Call
    calls: tuple[Call, ...]
    """The outermost calls of modules that run for it alone."""
    modules: Counter[str]
    parameters: tuple[str, ...]
    flops: int
    saved: float
    """The share of its branch's multiplications, from 0 to 1, that is deferred; of the addition
    that saves least."""
    own: float
    """The share of its mixing functions that nothing but the addition needs."""


class Analysis:
    """Which values and modules belong to which branch, of a forward pass that was recorded."""

    def __init__(
        self,
        recording: Recording,
        outputs: set[int],
        mixes: Callable[[str], bool],
        sites: Counter[Site],
    ) -> None:
        self.recording, self.outputs, self.mixes = recording, outputs, mixes
        self.sites = sites
        """How often each expression has added two tensors."""
        self.output: Any = None
        """What the model has returned."""
        self._inside: dict[Event, set[int]] = {}
        self.alive: set[int] = set()
        for output in outputs:
            if output not in self.alive:
                self.alive |= recording.reach(output)
        self.gave = {call.serial: outputs for call, outputs in recording.finished}
        self.of_module: dict[str, list[Call]] = {}
        for call in sorted((call for call, _ in recording.finished), key=lambda call: call.serial):
            self.of_module.setdefault(call.name, []).append(call)

    def of(self, module: str) -> list[Call]:
        """The calls of a module, by its name."""
        return self.of_module.get(module, [])

    def place(self, event: Event) -> None:
        """Find the innermost call that computes all of the branch that nothing else needs."""
        for call in reversed(event.stack):
            earliest = min([call.began, *call.inputs])
            kept = self.recording.reach(event.kept, earliest)
            branch = self.recording.reach(event.added, earliest) - kept
            own = self.exclusive(branch, {event.total})
            event.home, event.branch = call, branch
            if not any(
                value < call.began and event.kept in self.recording.reach(value, event.kept)
                for value in own
            ):
                return

    def exclusive(self, branch: set[int], totals: set[int]) -> set[int]:
        """The values of a branch that nothing else is computed from."""
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
        """The block of `events`, which are made in one call or one iteration of a loop."""
        kept = {event.kept for event in events}
        branch = set[int]().union(*(event.branch for event in events)) - kept
        own = self.exclusive(branch, {event.total for event in events})
        home = _common([event.home for event in events if event.home is not None])
        calls = [
            (call, outputs)
            for call, outputs in self.recording.finished
            if call.is_within(home)
            and outputs & own
            and all(n in own or n not in self.alive for n in outputs)
        ]
        serials = {call.serial for call, _ in calls}
        outermost = [
            call for call, _ in calls if not any(a.serial in serials for a in call.ancestors())
        ]
        owner = home
        while owner.parent is not None and (
            len(self.of_module.get(owner.name, [])) > 1
            or not all(f"{call.name}.".startswith(f"{owner.name}.") for call in outermost)
        ):  # a module that blocks share may be called, but have its name in another
            owner = owner.parent
        deferred = {value for call in outermost for value in range(call.began, call.ended)}
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
        shares = []
        for event in events:
            assert event.home is not None
            inside = {value for value in event.branch if value >= event.home.began}
            for values in (self._from_shortcut(event, inside), inside):
                costs = {value: self._cost(value) for value in values}
                if any(costs.values()):
                    break
            saved = sum(cost for value, cost in costs.items() if value in of)
            shares.append(saved / max(1, sum(costs.values())))
        return min(shares)

    def _from_shortcut(self, event: Event, inside: set[int]) -> set[int]:
        """What of a branch is computed from its shortcut, if anything is.

        What is computed of something else, such as the shifts and scales of a diffusion transformer
        that all of its blocks share, is no work of the branch's own.
        """
        reached = {event.kept}
        for value in sorted(inside):
            if not reached.isdisjoint(self.recording.values[value].parents):
                reached.add(value)
        return reached - {event.kept}

    def _cost(self, number: int) -> int:
        """Multiplications of what made a value, about; 0 of what does not mix.

        By the shapes of what it was given. Counting them exactly takes PyTorch's dispatcher, which
        loads the compiler, for seconds.
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
        """Whether everything computed from `other` goes into the branch of `event`."""
        assert event.home is not None
        if not event.home.began <= other.total < event.total or other.total not in event.branch:
            return False
        return other.total in self.inside(event)

    def inside(self, event: Event) -> set[int]:
        """What is computed for `event` alone: what comes of another addition is, in its branch.

        Of two streams that feed each other, each is computed from the other, and neither is inside.
        """
        known = self._inside.get(event)
        if known is None:
            known = self._inside[event] = self.exclusive(event.branch, {event.total})
        return known

    def flops(self, events: Iterable[Event]) -> int:
        """Of the branches of `events`, each function counted once."""
        branch = set[int]().union(*(event.branch for event in events))
        return sum(self.recording.values[value].flops for value in branch)

    def parameters(self, own: set[int]) -> tuple[str, ...]:
        """Names of the parameters that `own` were computed with."""
        parents = {p for value in own for p in self.recording.values[value].parents}
        return tuple(sorted(self.recording.parameters(own | parents)))

    def blocks(self, events: Iterable[Event], block_of: Callable[[str], str]) -> list[Group]:
        """Group `events` into blocks: by call of a module, or by iteration of a loop in it.

        Args:
            block_of: the name of the block that a module belongs to.
        """
        at: dict[int, list[Event]] = {}
        for event in events:
            if event.home is None:
                self.place(event)
            assert event.home is not None
            at.setdefault(event.home.serial, []).append(event)
        keyed: dict[tuple[str, Any], list[Event]] = {}
        for of_home in at.values():
            looped = max(Counter(event.site for event in of_home).values()) > 1
            for event in of_home:
                key = self._round(event, of_home) if looped else self._call(event, block_of)
                keyed.setdefault(key, []).append(event)
        return [self.group(name, self._outermost(events)) for (name, _), events in keyed.items()]

    def _outermost(self, events: Sequence[Event]) -> list[Event]:
        """Those that are not a part of the branch of another, and that the outputs need if any do.

        A stream of its own that ends in the last block is added to there, and never read.
        """
        events = [e for e in events if e.total in self.alive] or events
        return [e for e in events if not any(e.total in self.inside(o) for o in events)]

    def _call(self, event: Event, block_of: Callable[[str], str]) -> tuple[str, Any]:
        assert event.home is not None
        name = block_of(event.home.name)
        if not name:  # the model itself is not a block: each of its additions is one
            return ".".join(self._runs(event)), (event.site, event.occurrence)
        around = [call for call in (event.home, *event.home.ancestors()) if call.name == name]
        call = around[0] if around else event.home
        return name, self.of_module[call.name].index(call) if call.name in self.of_module else 0

    def _round(self, event: Event, others: Sequence[Event]) -> tuple[str, Any]:
        """The outermost module, inside of the one that loops, in which no addition comes again."""
        assert event.home is not None
        inside = {id(other): self._runs(other) for other in others}
        path = inside[id(event)]
        start = len(event.home.name.split(".")) if event.home.name else 0
        for length in range(start + 1, len(path) + 1):
            prefix = path[:length]
            sites = [o.site for o in others if inside[id(o)][:length] == prefix]
            if len(sites) == len(set(sites)):
                return ".".join(prefix), None
        same = [o for o in others if inside[id(o)] == path and o.site == event.site]
        return ".".join(path), same.index(event)

    def _runs(self, event: Event) -> list[str]:
        """The common prefix of the names of the branch's modules, or the name of one of them.

        Modules that run for several branches are ignored, as they do not distinguish them.
        """
        assert event.home is not None
        calls = self.group("", [event]).calls
        calls = [c for c in calls if len(self.of_module[c.name]) == 1] or calls or [event.home]
        paths = [call.name.split(".") for call in calls]
        common = paths[0]
        for path in paths[1:]:
            same = (a == b for a, b in zip(common, path, strict=False))
            common = common[: sum(itertools.takewhile(bool, same))]
        start = len(event.home.name.split(".")) if event.home.name else 0
        if len(common) > start:
            return common
        largest = max(calls, key=lambda call: sum(p.numel() for p in call.module.parameters()))
        return largest.name.split(".")

    def edits(self, group: Group, copies: bool, first: int) -> list[Deferred]:
        """Where `group` gets its gates.

        Raises:
            UnsupportedBlockError: when too little of its branch is for the addition alone.
        """
        if group.saved < LEAST:
            raise UnsupportedBlockError(
                needed(group.own) if group.own < LEAST else "no module runs for it"
            )
        made = []
        for number, event in enumerate(group.events):
            calls: dict[str, list[Call]] = {}
            for call in group.calls:
                if len(group.events) == 1 or self._is_of(call, event):
                    inner = call.name[len(group.owner.name) + 1 if group.owner.name else 0 :]
                    calls.setdefault(inner, []).append(call)
            if not calls:
                raise UnsupportedBlockError("no module runs for its branch alone")
            made.append(
                Deferred(
                    group.block,
                    first + number,
                    ((event.site, event.side),),
                    tuple(
                        Calls(
                            name,
                            tuple(self._ordinal(call, group.owner) for call in which),
                            self._number(name, group.owner),
                            all(call.gave_tensor for call in which),
                        )
                        for name, which in calls.items()
                    ),
                    copies,
                )
            )
        return made

    def _is_of(self, call: Call, event: Event) -> bool:
        computed = range(call.began, call.ended)  # nothing, where it gives what it is given
        return not event.branch.isdisjoint([*computed, *self.gave[call.serial]])

    def _all(self, name: str, owner: Call) -> list[Call]:
        whole = f"{owner.name}.{name}" if owner.name else name
        return [call for call in self.of_module[whole] if call.is_within(owner)]

    def _ordinal(self, call: Call, owner: Call) -> int:
        inner = call.name[len(owner.name) + 1 if owner.name else 0 :]
        return self._all(inner, owner).index(call)

    def _number(self, name: str, owner: Call) -> int:
        return len(self._all(name, owner))


def _common(calls: Sequence[Call]) -> Call:
    """The innermost call within which all of `calls` are."""
    first = calls[0]
    while not all(call is first or call.is_within(first) for call in calls):
        assert first.parent is not None
        first = first.parent
    return first
