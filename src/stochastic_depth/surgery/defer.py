"""Residual blocks whose branch is put off while they are closed: nothing of the model is rewritten.

While a gate is closed the modules that run for the branch alone are not called; each gives a
`Placeholder`, and the addition, which is known by where it stands in the code, gives its shortcut.
Where a gate scales a branch, or counts it for some samples, its values are marked the same way, so
that the addition knows them.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from stochastic_depth.errors import GateError, UnsupportedBlockError
from stochastic_depth.gates import BlockGates, Gate
from stochastic_depth.surgery.edits import Calls, Deferred, Site
from stochastic_depth.surgery.placeholder import (
    Node,
    Placeholder,
    Tape,
    Turn,
    begin_tape,
    marked,
    no_graph,
    put_off,
    put_off_as,
    resolved,
    tape_of_pass,
)
from stochastic_depth.surgery.trace import Call, Recording

_CALL = "_compiled_call_impl"
"""The attribute of a module that is called in place of its forward method and hooks."""


LEAST = 0.5
"""The share of a branch's mixing functions that a closed block must save."""

NEEDED = (
    "most of its branch is needed for more than what is added: an output of the model, or of "
    "another block, is computed from it"
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
    """The share of its mixing functions, from 0 to 1, that are put off; of the addition that saves
    least."""
    own: float
    """The share of those that nothing but the addition needs."""


class Analysis:
    """What the branches of a watched forward pass consist of, once all of it is known."""

    def __init__(self, recording: Recording, outputs: set[int], mixes: Callable[[str], bool]):
        self.recording, self.outputs, self.mixes = recording, outputs, mixes
        self.alive: set[int] = set()
        for output in outputs:
            if output not in self.alive:
                self.alive |= recording.reach(output)
        self.of_module: dict[str, list[Call]] = {}
        for call in sorted((call for call, _ in recording.finished), key=lambda call: call.serial):
            self.of_module.setdefault(call.name, []).append(call)

    def place(self, event: Event) -> None:
        """Find the innermost call that computes all of the branch that is for it alone."""
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
        """Those values of a branch that nothing else is computed from."""
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
        """The block that `events` make up, which are of one call or of one iteration of a loop."""
        branch = set[int]().union(*(event.branch for event in events))
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
        while owner.parent is not None and len(self.of_module.get(owner.name, [])) > 1:
            owner = owner.parent
        put_off = {value for call in outermost for value in range(call.began, call.ended)}
        return Group(
            block,
            tuple(events),
            owner,
            tuple(outermost),
            Counter(call.name for call, _ in calls),
            self.parameters(own),
            sum(self.recording.values[value].flops for value in own & put_off),
            self._share(events, put_off),
            self._share(events, own),
        )

    def _share(self, events: Sequence[Event], of: set[int]) -> float:
        shares = []
        for event in events:
            assert event.home is not None
            inside = [value for value in event.branch if value >= event.home.began]
            mixing = [v for v in inside if self.mixes(self.recording.values[v].made_by)]
            shares.append(sum(value in of for value in mixing) / max(1, len(mixing)))
        return min(shares)

    def surrounds(self, event: Event, other: Event) -> bool:
        """Whether all that comes of `other` goes into the branch of `event`."""
        assert event.home is not None
        if not event.home.began <= other.total < event.total or other.total not in event.branch:
            return False
        return other.total in self.exclusive(event.branch, {event.total})

    def parameters(self, own: set[int]) -> tuple[str, ...]:
        """Names of the parameters that `own` were computed with."""
        parents = {p for value in own for p in self.recording.values[value].parents}
        return tuple(sorted(self.recording.parameters(own | parents)))

    def blocks(self, events: Iterable[Event], block_of: Callable[[str], str]) -> list[Group]:
        """`events` as blocks: those of one call of a module, or of one round of a loop in it.

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
        return [self.group(name, _outermost(events)) for (name, _), events in keyed.items()]

    def _call(self, event: Event, block_of: Callable[[str], str]) -> tuple[str, Any]:
        assert event.home is not None
        name = block_of(event.home.name)
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
        """The path that the names of the modules in the branch have in common."""
        assert event.home is not None
        calls = self.group("", [event]).calls
        paths = [call.name.split(".") for call in calls] or [event.home.name.split(".")]
        common = paths[0]
        for path in paths[1:]:
            common = [a for a, b in zip(common, path, strict=False) if a == b]
        start = len(event.home.name.split(".")) if event.home.name else 0
        return common if len(common) > start else paths[-1]

    def edits(self, group: Group, copies: bool, first: int) -> list[Deferred]:
        """Where `group` gets its gates.

        Raises:
            UnsupportedBlockError: when too little of its branch is for the addition alone.
        """
        if group.saved < LEAST:
            raise UnsupportedBlockError(NEEDED if group.own < LEAST else "no module runs for it")
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
                    frozenset([event.site]),
                    event.side,
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
        return any(value in event.branch for value in range(call.began, call.ended))

    def _all(self, name: str, owner: Call) -> list[Call]:
        whole = f"{owner.name}.{name}" if owner.name else name
        return [call for call in self.of_module[whole] if call.is_within(owner)]

    def _ordinal(self, call: Call, owner: Call) -> int:
        inner = call.name[len(owner.name) + 1 if owner.name else 0 :]
        return self._all(inner, owner).index(call)

    def _number(self, name: str, owner: Call) -> int:
        return len(self._all(name, owner))


def _outermost(events: Sequence[Event]) -> list[Event]:
    """Those that are not a part of the branch of another."""
    return [e for e in events if not any(e.total in other.branch for other in events)]


def _common(calls: Sequence[Call]) -> Call:
    """The innermost call within which all of `calls` are."""
    first = calls[0]
    while not all(call is first or call.is_within(first) for call in calls):
        assert first.parent is not None
        first = first.parent
    return first


# What follows runs in the model.


class _Plan:
    """Of one owner: whose calls are put off for which of its additions."""

    def __init__(self, owner: nn.Module, edits: Sequence[Deferred]) -> None:
        self.modules: list[tuple[nn.Module, str, dict[int, list[int]], int, bool]] = []
        self.of_edit: list[list[int]] = [[] for _ in edits]
        by_name: dict[str, dict[int, list[int]]] = {}
        number: dict[str, int] = {}
        tensor: dict[str, bool] = {}
        for n, edit in enumerate(edits):
            for calls in edit.calls:
                number[calls.module] = calls.of
                tensor[calls.module] = calls.tensor and tensor.get(calls.module, True)
                for which in calls.which:
                    by_name.setdefault(calls.module, {}).setdefault(which, []).append(n)
        for name, of_call in by_name.items():
            same = set(map(tuple, of_call.values()))
            if len(same) == 1 and len(of_call) == number[name]:
                of_call, number[name] = {-1: next(iter(of_call.values()))}, 0
            for n in {n for edits_of in of_call.values() for n in edits_of}:
                self.of_edit[n].append(len(self.modules))
            module = owner.get_submodule(name)
            self.modules.append((module, name, of_call, number[name], tensor[name]))
        self.structures: dict[Any, Any] = {}


_PLANS: weakref.WeakKeyDictionary[nn.Module, _Plan] = weakref.WeakKeyDictionary()


def deferring_forward(
    forward: Callable[..., Any], edits: Sequence[tuple[int, Deferred]], gates: str, is_entry: bool
) -> Any:
    """`forward` of an owner, under the gates of `edits`, which have these numbers in `gates`."""
    numbers = [number for number, _ in edits]
    only = [edit for _, edit in edits]

    @wraps(forward)
    def deferring(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_all: tuple[BlockGates, ...] = self.__dict__[gates]
        now = [of_all[number].now(self.training) for number in numbers]
        tape = tape_of_pass()
        if (is_entry and tape is None) or not all(map(_is_plain, now)):
            begin_tape(tape or Tape())
            try:
                with _Session(self, only, now) as session:
                    output = forward(self, *args, **kwargs)
                session.see_that_all_were_met()
                return resolved(output, everything=tape is None and is_entry)
            finally:
                begin_tape(tape)
        return forward(self, *args, **kwargs)

    return deferring


def _is_plain(gate: Gate) -> bool:
    """Whether a branch is added as it is."""
    return gate.learns and gate.factor is None and gate.batch is None


class _Session:
    """One call of an owner, during which modules of its branches are put off or marked."""

    def __init__(self, owner: nn.Module, edits: Sequence[Deferred], gates: Sequence[Gate]) -> None:
        plan = _PLANS.get(owner)
        if plan is None:
            plan = _PLANS[owner] = _Plan(owner, edits)
        self.plan, self.edits = plan, edits
        self.turns = {
            n: Turn(edit.block, edit.sites, edit.side, gate, edit.copies)
            for n, (edit, gate) in enumerate(zip(edits, gates, strict=True))
            if not _is_plain(gate)
        }
        self.before: list[tuple[nn.Module, Any]] = []

    def __enter__(self) -> "_Session":
        tape = tape_of_pass()
        assert tape is not None
        for m in sorted({m for n in self.turns for m in self.plan.of_edit[n]}):
            module, name, of_call, total, tensor = self.plan.modules[m]
            before = module.__dict__.get(_CALL)
            self.before.append((module, before))
            module.__dict__[_CALL] = _Interceptor(
                self, tape, before, module, name, of_call, total, tensor
            )
        return self

    def __exit__(self, *_: Any) -> None:
        for module, before in self.before:
            if before is None:
                module.__dict__.pop(_CALL, None)
            else:
                module.__dict__[_CALL] = before

    def see_that_all_were_met(self) -> None:
        """Raise `GateError` when a branch was put off, and its addition did not come."""
        for n, turn in self.turns.items():
            if turn.handed and not turn.met:
                raise GateError(
                    f"block {turn.name!r}: {self.edits[n]}, by which it was found, was not met in "
                    "this pass: the model takes another way here than on the example; give "
                    "sd.apply an example that takes it"
                )


class _Interceptor:
    """Stands in for the calls of one module during a session."""

    def __init__(
        self,
        session: _Session,
        tape: Tape,
        before: Any,
        module: nn.Module,
        name: str,
        of_call: Mapping[int, list[int]],
        total: int,
        gives_tensor: bool,
    ) -> None:
        self.session, self.tape, self.module, self.name = session, tape, module, name
        self.gives_tensor = gives_tensor
        self.forward = before or module._call_impl
        self.of_call, self.total, self.called = of_call, total, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mine = self.of_call.get(-1)
        if mine is None:
            if self.called >= self.total:
                raise GateError(
                    f"{self.name!r} is called more often than the {self.total} times that it was "
                    "on the example: its calls are told apart by their number; give sd.apply an "
                    "example with as many"
                )
            mine = self.of_call.get(self.called, [])
            self.called += 1
        turns = [self.session.turns[n] for n in mine if n in self.session.turns]
        if not turns:
            return self.forward(*args, **kwargs)
        for turn in turns:
            turn.handed += 1
        if not all(turn.gate.open for turn in turns):
            return self.put_off(tuple(turns), args, kwargs)
        samples = {id(turn.gate.samples): turn.gate for turn in turns}
        args, kwargs = resolved(args), resolved(kwargs)
        if len(samples) == 1 and len(turns) == len(mine):
            (gate,) = samples.values()
            args, kwargs = gate.select(args), gate.select(kwargs)
        with no_graph(turns if len(turns) == len(mine) else []):
            return marked(self.tape, tuple(turns), self.forward(*args, **kwargs))

    def put_off(self, turns: tuple[Turn, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        node = Node(self.tape, turns, self.forward, args, kwargs, self.module)
        structures = self.session.plan.structures
        key = self.name, self.module.training, _form(args), _form(kwargs)
        known = structures.get(key)
        if known is None:
            made = put_off(node, self.gives_tensor)
            leaves, structure = tree_flatten(made)
            free = all(isinstance(leaf, Tensor) or leaf is None for leaf in leaves)
            if free and not node.done:
                structures[key] = [isinstance(leaf, Tensor) or None for leaf in leaves], structure
            return made
        return put_off_as(node, *known)


def _form(values: Any) -> Any:
    """Equal for arguments that differ in the tensors alone."""
    if isinstance(values, Tensor):
        return values.ndim if not isinstance(values, Placeholder) else Tensor
    if isinstance(values, tuple | list):
        return tuple(map(_form, values))
    if isinstance(values, Mapping):
        return tuple((name, _form(each)) for name, each in values.items())
    return values if isinstance(values, bool | int | float | str | None) else type(values)
