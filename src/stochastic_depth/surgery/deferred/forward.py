"""Run a module so that the branches of closed blocks are deferred; nothing is rewritten.

While a gate is closed, the modules that only its branch needs are not called. Each call returns a
`Placeholder` instead, and the addition, which is recognised by its call site, returns its shortcut.
If a gate scales a branch, or opens it for some samples only, the values of the branch are marked as
placeholders too, so that the addition recognises them.
"""

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, wraps
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import (
    AdditionNotReachedError,
    BypassedAdditionWarning,
    GateError,
)
from stochastic_depth.gates import BlockGates, Gate
from stochastic_depth.module_snapshot import ModuleSnapshot
from stochastic_depth.surgery.deferred.dispatch import defer_call, mark_as_branch, placeholder_of
from stochastic_depth.surgery.deferred.gates import selected_values
from stochastic_depth.surgery.deferred.placeholder import (
    GatedAddition,
    Node,
    Placeholder,
    Tape,
    is_known,
    is_plain,
    operands,
    set_tape,
    tape_of_pass,
    with_values,
)
from stochastic_depth.surgery.edits import NOT_REACHED, BranchCalls, DeferredEdit
from stochastic_depth.tensors import ATOMS, attributes
from stochastic_depth.torch_private import (
    call_of,
    never_traced,
    set_call,
    whole_call,
)


@dataclass(frozen=True, eq=False)
class _DeferredModule:
    """A module of which some calls are made only for deferred additions.

    Additions are given by their numbers among those of the owner.
    """

    module: nn.Module
    name: str
    """Its name, relative to the owner."""
    calls: int
    """How often the owner called it on the example."""
    additions_of: Mapping[int, tuple[int, ...]]
    """For each of these calls, by number, the additions that need it."""
    gives_tensor: bool
    """Whether each call returned a tensor, rather than a tuple or another structure."""

    @cached_property
    def additions_of_every(self) -> tuple[int, ...] | None:
        """The additions that every call is made for; None if they differ from call to call."""
        first, *others = self.additions_of.values()
        alike = len(self.additions_of) == self.calls and all(other == first for other in others)
        return first if alike else None


class _DeferredCalls:
    """The module calls that are deferred for the additions of one owner.

    The modules are those that the owner now holds under the names in `edits`.
    """

    def __init__(self, owner: nn.Module, edits: Sequence[DeferredEdit]) -> None:
        self.edits = edits
        calls_of: dict[str, list[tuple[int, BranchCalls]]] = {}
        for number, edit in enumerate(edits):
            for calls in edit.calls:
                calls_of.setdefault(calls.module, []).append((number, calls))
        self.modules: list[_DeferredModule] = []
        self.modules_of: list[list[_DeferredModule]] = [[] for _ in edits]
        """For each addition, the modules that are called for it."""
        self.snapshot = ModuleSnapshot(owner, calls_of)
        for name, submodule in self.snapshot.modules.items():
            pairs = calls_of[name]
            additions_of: dict[int, tuple[int, ...]] = {}
            for number, calls in pairs:
                for call in calls.indices:
                    additions_of[call] = (*additions_of.get(call, ()), number)
            module = _DeferredModule(
                submodule,
                name,
                pairs[-1][1].count,
                additions_of,
                all(calls.return_tensors for _, calls in pairs),
            )
            self.modules.append(module)
            for number in {number for number, calls in pairs if calls.indices}:
                self.modules_of[number].append(module)
        self.counted = [
            each
            for each in self.modules
            if len(each.additions_of) < each.calls
            and not any(each.module in m.module.modules() for m in self.modules if m is not each)
        ]
        """The modules of which only some calls belong to a branch; counting tells which. A module
        inside another of them is left out, because skipping the outer one changes its count."""
        self.give_tensor = set[Any]()
        """The deferred calls whose result is one tensor, by module and form of the arguments. The
        number of tensors in other results may depend on shapes."""


_DEFERRED_CALLS: weakref.WeakKeyDictionary[nn.Module, _DeferredCalls] = weakref.WeakKeyDictionary()


def deferring_forward(
    forward: Callable[..., Any],
    edits: Sequence[tuple[int, DeferredEdit]],
    gates: str,
    is_entry: bool,
    is_helper: bool = False,
) -> Any:
    """The method `forward` of an owner, under the gates of its deferred additions.

    Args:
        edits: the deferred additions, each with the number of its gate.
        gates: the attribute of the module that holds all of its gates.
        is_entry: whether all deferred calls that the outputs need are made at the end, as those of
            the model itself are.
        is_helper: whether `forward` is another method, which has gates of its own only when the
            forward method does not call it.
    """
    numbers = [number for number, _ in edits]
    only = [edit for _, edit in edits]

    def deferring(self: Any, *args: Any, **kwargs: Any) -> Any:
        of_all: tuple[BlockGates, ...] = self.__dict__[gates]
        now = [of_all[number].now(self.training) for number in numbers]
        tape = tape_of_pass()
        if (is_entry and tape is None) or not all(gate.is_plain for gate in now):
            mine = tape or Tape()
            set_tape(mine)
            try:
                with _Session(self, only, now) as session:
                    output = forward(self, *args, **kwargs)
                session.require_calls_counted()
                session.require_additions_reached()
                session.refuse_recomputed()
                return with_values(output, None if tape is None and is_entry else is_known)
            finally:
                set_tape(tape)
                if tape is None:
                    mine.end()
        return forward(self, *args, **kwargs)

    @wraps(forward)
    def outermost(self: Any, *args: Any, **kwargs: Any) -> Any:
        if is_helper and self in _owners():
            return forward(self, *args, **kwargs)
        with _running(self):
            return deferring(self, *args, **kwargs)

    return never_traced(outermost)


_local = threading.local()


def _owners() -> list[nn.Module]:
    """The modules whose additions are deferred and that are running in this thread."""
    if not hasattr(_local, "owners"):
        _local.owners = []
    return _local.owners


@contextmanager
def _running(owner: nn.Module) -> Iterator[None]:
    _owners().append(owner)
    try:
        yield
    finally:
        _owners().pop()


class _Session:
    """One call of an owner, with the calls in its branches deferred, or their results marked."""

    def __init__(
        self, owner: nn.Module, edits: Sequence[DeferredEdit], gates: Sequence[Gate]
    ) -> None:
        plan = _DEFERRED_CALLS.get(owner)
        if plan is None or plan.edits is not edits or not plan.snapshot.is_current():
            plan = _DEFERRED_CALLS[owner] = _DeferredCalls(owner, edits)
        self.plan, self.edits = plan, edits
        self.additions = {
            n: GatedAddition(edit.block, dict(edit.sites), gate, edit.copies, edit.promotion, owner)
            for n, (edit, gate) in enumerate(zip(edits, gates, strict=True))
            if not gate.is_plain
        }
        self.before: list[tuple[_Switch, Any]] = []
        self.called: dict[_DeferredModule, int] = {}
        """How often each module was called so far."""
        self._gated: dict[tuple[int, ...], tuple[GatedAddition, ...]] = {}

    def __enter__(self) -> "_Session":
        tape = tape_of_pass()
        assert tape is not None
        for addition in self.additions.values():
            addition.caller = sys._getframe(1)
        needed = {module for n in self.additions for module in self.plan.modules_of[n]}
        for deferred in self.plan.modules:
            if deferred in needed:
                switch = _Switch.on(deferred.module)
                before = switch.here()
                self.before.append((switch, before))
                forward = before or switch.otherwise
                self.called[deferred] = 0
                switch.switch_to(_Interceptor(self, tape, forward, deferred))
        return self

    def __exit__(self, *_: Any) -> None:
        for switch, before in self.before:
            switch.switch_to(before)
        for addition in self.additions.values():
            addition.caller = None

    def gated(self, numbers: tuple[int, ...]) -> tuple[GatedAddition, ...]:
        """Those of the additions with these numbers that have a gate in this call; one object."""
        if numbers not in self._gated:
            additions = tuple(self.additions[n] for n in numbers if n in self.additions)
            self._gated[numbers] = additions
        return self._gated[numbers]

    def require_calls_counted(self) -> None:
        """Raise `GateError` if a module whose calls are counted was called less often than on the
        example."""
        for deferred in self.plan.counted:
            if 0 < self.called.get(deferred, 0) < deferred.calls:
                raise _count_differs(deferred, "less")

    def require_additions_reached(self) -> None:
        """Raise `AdditionNotReachedError` if a branch was deferred and never added.

        Warn if training never reached the addition; the path taken instead is not skippable.
        """
        for n, addition in self.additions.items():
            if addition.reached:
                continue
            message = f"block {addition.name!r}, {self.edits[n]}: {NOT_REACHED}"
            if addition.deferred:
                error = AdditionNotReachedError(message)
                error.block = addition.name
                raise error
            if addition.owner.training and self.plan.modules_of[n]:
                warnings.warn(message, BypassedAdditionWarning, stacklevel=3)

    def refuse_recomputed(self) -> None:
        """Raise `GateError` when a checkpoint would recompute a branch without its gate."""
        for n, addition in self.additions.items():
            if addition.recomputed and any(again() for again in addition.recomputed):
                raise GateError(
                    f"block {addition.name!r}: {self.edits[n]} is within a function that "
                    "torch.utils.checkpoint recomputes in the backward pass, where it has no "
                    "gate: checkpoint only the branch, x = x + checkpoint(branch, x), or the "
                    "module that adds, checkpoint(layer, x)"
                )


class _Switch:
    """Stand-in for a module's call: runs this thread's replacement if there is one, otherwise the
    module."""

    lock = threading.Lock()

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, call_of(module)
        self.otherwise: Callable[..., Any] = self.before or whole_call(module)
        self.of_thread: dict[int, Callable[..., Any] | None] = {}

    @classmethod
    def on(cls, module: nn.Module) -> "_Switch":
        """The switch of `module`; this thread is registered on it until it switches to None."""
        with cls.lock:
            switch = call_of(module)
            if not isinstance(switch, _Switch):
                switch = _Switch(module)
                set_call(module, switch)
            switch.of_thread.setdefault(get_ident(), None)
            return switch

    def here(self) -> Callable[..., Any] | None:
        """The function that replaces the module in this thread, or None."""
        return self.of_thread.get(get_ident())

    def switch_to(self, to: Callable[..., Any] | None) -> None:
        """Let `to` replace the module in this thread; None ends the replacement."""
        with self.lock:
            if to is not None:
                self.of_thread[get_ident()] = to
                return
            del self.of_thread[get_ident()]
            if self.of_thread:
                return
            set_call(self.module, self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.of_thread.get(get_ident()) or self.otherwise)(*args, **kwargs)


class _Interceptor:
    """Replaces the call of one module during a session: defers the call, or marks its result."""

    def __init__(
        self,
        session: _Session,
        tape: Tape,
        forward: Callable[..., Any],
        deferred: _DeferredModule,
    ) -> None:
        self.session, self.tape, self.forward, self.deferred = session, tape, forward, deferred

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        deferred, every = self.deferred, self.deferred.additions_of_every
        called = self.session.called[deferred]
        if every is None and called >= deferred.calls:
            raise _count_differs(deferred, "more")
        mine = deferred.additions_of.get(called, ()) if every is None else every
        self.session.called[deferred] = called + 1
        additions = self.session.gated(mine)
        if not additions:
            return self.forward(*args, **kwargs)
        is_open = True
        for addition in additions:
            addition.deferred += 1
            if every is not None:
                rounds = called // deferred.calls + 1
                addition.begun = max(addition.begun, rounds, addition.reached + 1)
            is_open = is_open and addition.gate.open
        if not is_open:
            return self.defer_call(additions, args, kwargs)
        gate = additions[0].gate
        alike = all(addition.gate.samples is gate.samples for addition in additions)
        if gate.samples is not None and alike and len(additions) == len(mine):
            key = deferred.name, called if every is None else 0
            args, kwargs = selected_values((args, kwargs), additions, lambda: key)
        else:
            args, kwargs = with_values((args, kwargs))
        return mark_as_branch(self.tape, additions, self.forward(*args, **kwargs))

    def defer_call(
        self, additions: tuple[GatedAddition, ...], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        deferred = self.deferred
        needs = operands((args, kwargs) if kwargs else args)
        node = Node(self.tape, additions, self.forward, args, kwargs, needs, deferred.module)
        give_tensor = self.session.plan.give_tensor
        key = deferred.name, node.settings, _form(args), _form(kwargs) if kwargs else ()
        if key in give_tensor:
            return placeholder_of(node)
        made = defer_call(node, deferred.gives_tensor)
        if isinstance(made, Tensor) and not node.done:
            if len(give_tensor) > 1000:
                give_tensor.clear()
            give_tensor.add(key)
        return made


def _count_differs(deferred: _DeferredModule, how: str) -> GateError:
    return GateError(
        f"{deferred.name!r} is called {how} often than on the example ({deferred.calls} times), so "
        "it is not known which of its calls belong to which block: give sd.apply an example with "
        "as many calls; if their number differs from input to input, give the model a module of "
        "its own for each place, or exclude= these blocks"
    )


def _form(values: Any) -> Any:
    """A key that is equal for arguments that differ only in their tensors."""
    if type(values) in ATOMS:
        return values
    if isinstance(values, Tensor):
        return values.ndim if not isinstance(values, Placeholder) else Tensor
    if isinstance(values, tuple | list):
        return tuple(map(_form, values))
    if isinstance(values, Mapping):
        return tuple((name, _form(each)) for name, each in values.items())
    return type(values), tuple(filter(is_plain, attributes(values).values()))
