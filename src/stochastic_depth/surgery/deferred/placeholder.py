"""Deferred calls of a branch, and the placeholders that stand for their results.

While a block is closed, a call that only its branch needs is not made. A `Node` stores the call
with its arguments. A `Placeholder` stands for a tensor in the result. A `Tape` keeps the nodes of a
forward pass in program order. `value` and `with_values` return the tensors themselves: they make
the call, under the gradient mode and autocast in which the model asked for it.

A placeholder may also stand for a tensor that is already computed, so that the residual addition
recognises its branch. A `GatedAddition` is one addition during one call of the module that adds.

`dispatch` says what PyTorch's functions do with a placeholder.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.frames import CallSite
from stochastic_depth.tensors import ATOMS, Promotion, map_structure, tensors_in
from stochastic_depth.torch_private import changes_of

_SHAPELESS = {nn.Sequential, nn.ModuleList, nn.Identity, nn.Dropout, nn.Linear, nn.LayerNorm}
_SHAPELESS |= {nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU}
_SHAPELESS |= {nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Softmax, nn.Mish}
"""Classes whose plain attributes say nothing about the shape of the result, though they may change
in each step as dropout rates do."""
_NO_SETTINGS = {dict, OrderedDict, set}
"""Types of most attributes of a module, in which no settings are looked for."""
_local = threading.local()


@dataclass(slots=True, eq=False)
class GatedAddition:
    """One residual addition during one call of its owner, under a gate that changes the branch.

    The owner is the module whose code adds. A placeholder carries the additions to whose branches
    it belongs, so that an addition can find itself among them.
    """

    name: str
    """The name of the block, for errors."""
    sites: Mapping[CallSite, int]
    """The call sites of the addition, each with the side of its shortcut."""
    gate: Gate
    copies: bool
    """Whether a closed addition returns a copy of its shortcut."""
    promotion: Promotion | None
    """How its shortcut gets the dtype of the sum; None if it has it."""
    owner: nn.Module
    caller: FrameType | None = None
    """The frame that calls the owner's own forward method, while it runs."""
    deferred: int = 0
    """How many module calls have returned placeholders of this branch."""
    begun: int = 1
    """How often the branch is computed, as far as is known by the calls of its modules: more than
    once where the model adds in a loop that is longer than on the example."""
    reached: int = 0
    """How often the addition was made."""
    without_graph: bool = False
    """Whether a value of its branch was computed without a graph within an `autograd.Function`,
    which does not see that placeholders need a gradient."""
    recomputed: list[Callable[[], bool]] | None = field(
        default_factory=lambda: [] if torch.is_grad_enabled() else None
    )
    """For each checkpoint around the addition, a function that returns whether it will
    recompute."""

    @property
    def is_made(self) -> bool:
        """Whether the sum of each branch that has begun is made, or the owner's call has ended."""
        return self.reached >= self.begun or self.caller is None

    @property
    def is_over(self) -> bool:
        """Whether nothing is added any more, so that what is left of the branch is used outside."""
        return self.reached >= self.begun * len(self.sites) or self.caller is None


class Tape:
    """The calls that a forward pass has deferred, in program order.

    If one of them works in place, all are made, in this order, as soon as one result is needed. So
    views, and values that were read before the change, have the right content.
    """

    def __init__(self) -> None:
        self.nodes: list[weakref.ref[Node]] = []
        """Weak references, because a call whose result is no longer referenced need not be made."""
        self.in_place: list[Node] = []
        """The calls that change a tensor."""
        self.changes_computed = False
        """Whether one of them changes a tensor that is already computed."""
        self.is_running = False
        self.is_over = False
        """Whether the forward pass has ended, so that later uses of results are not deferred."""

    def end(self) -> None:
        """End the forward pass.

        A result of a closed branch that a module has kept may be read later, as long as the weights
        are those of this pass.
        """
        self.is_over = True
        for reference in self.nodes:
            node = reference()
            if node is not None and not node.done and node.module is not None:
                state = [*node.module.parameters(), *node.module.buffers()]
                node.versions += _versions(state)

    def run(self) -> None:
        """Make all of the calls whose results may still be needed."""
        self.is_running = True
        try:
            for reference in list(self.nodes):
                node = reference()
                if node is not None:
                    node.run()
        finally:
            self.is_running = False


def tape_of_pass() -> Tape | None:
    """The tape of the outermost call in this thread that defers calls; None if there is none."""
    return getattr(_local, "tape", None)


def set_tape(tape: Tape | None) -> None:
    """Set the tape of the pass in this thread; None means that no pass defers calls."""
    _local.tape = tape


class Reason(NamedTuple):
    """Why a deferred call is made although its block is closed."""

    text: str
    hides_structure: bool = False
    """Whether the structure of its output is known only after computing it. Rewritten code never
    asks for that."""


@contextmanager
def because(reason: Reason) -> Iterator[None]:
    """While entered, `reason` is the recorded reason for making deferred calls."""
    before = why_computed()
    _local.reason = reason
    try:
        yield
    finally:
        _local.reason = before


def why_computed() -> Reason | None:
    """The reason why a deferred call is being made; None if none was recorded."""
    return getattr(_local, "reason", None)


class Node:
    """A deferred call of a function or module; and its result, once the call was made.

    Args:
        additions: the residual additions to whose branches the call belongs.
        needs: the placeholders, and the computed tensors, among the arguments (`operands`).
        module: the module that is called, if it is one; `function` is then its forward pass.
    """

    __slots__ = (
        "__weakref__",
        "additions",
        "args",
        "context",
        "done",
        "function",
        "kwargs",
        "module",
        "needs_grad",
        "placeholders",
        "results",
        "settings",
        "shapes",
        "tape",
        "tensors",
        "value",
        "versions",
    )

    def __init__(
        self,
        tape: Tape,
        additions: tuple[GatedAddition, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        needs: "tuple[list[Placeholder], list[Tensor]]",
        module: nn.Module | None = None,
    ) -> None:
        self.tape, self.additions, self.function, self.module = tape, additions, function, module
        self.args = tuple(map(_as_given, args))
        self.kwargs = {name: _as_given(each) for name, each in kwargs.items()} if kwargs else kwargs
        self.placeholders, computed = needs
        self.done, self.value = False, None
        self.shapes: Any = None
        """The shapes of the result, once `shapes_of` has inferred them."""
        self.needs_grad: bool | None = None
        """Whether autograd would track the result, once `requires_grad` has found out."""
        self.results = 1
        """How many tensors the result has."""
        self.settings = () if module is None else _settings(module)
        """The plain attributes of the module: its result may depend on them."""
        self.context = _context()
        """The gradient mode and autocast in which the model asked for the call."""
        self.versions = _versions(computed)
        """The tensors that it reads, each with the number of its changes in place so far."""
        tape.nodes.append(weakref.ref(self))

    def result(self) -> Any:
        """The result of the call, which is made now if it was not made before."""
        tape = self.tape
        if tape.in_place and not tape.is_running and (not self.done or tape.changes_computed):
            tape.run()
        return self.run()

    def run(self) -> Any:
        """As `result`, regardless of other calls on the tape that it does not need."""
        if not self.done:
            for node in in_order(self, lambda node: node.done):
                if node is self:
                    node._make()
                else:
                    node.result()
        return self.value

    def _make(self) -> None:
        """Make the call, all of whose arguments are known."""
        for tensor, version in self.versions:
            if changes_of(tensor) != version:
                raise GateError(
                    f"the output of {_name(self)} in a closed branch is read only now, but its "
                    f"input (shape {list(tensor.shape)}) was modified in place since, e.g. by "
                    "optimizer.step(). Read it earlier, or exclude= the block"
                )
        args, kwargs = with_values((self.args, self.kwargs))
        with under(self.context):
            self.value = self.function(*args, **kwargs)
        self.done, self.tensors = True, tensors_in(self.value)
        del self.args, self.kwargs, self.placeholders, self.versions

    @classmethod
    def finished(cls, tape: Tape, additions: tuple[GatedAddition, ...], tensor: Tensor) -> "Node":
        """A node for a tensor that is already computed; it is not put on the tape."""
        node = cls.__new__(cls)
        node.tape, node.additions, node.done, node.value = tape, additions, True, tensor
        node.results, node.tensors = 1, [tensor]
        return node


def in_order(node: Node, is_ready: Callable[[Node], bool]) -> Iterator[Node]:
    """`node` and the calls that it needs, each after those that it needs itself.

    Chains of calls are too long for recursion.

    Args:
        is_ready: whether nothing is to be done for a call. The caller makes each one ready before
            it takes the next.
    """
    pending = [node]
    while pending:
        node = pending[-1]
        if is_ready(node):  # or it was needed twice
            pending.pop()
            continue
        if needed := [p._node for p in node.placeholders if not is_ready(p._node)]:
            pending += needed
        else:
            yield pending.pop()


class Placeholder(Tensor):
    """A tensor of a branch: either deferred, or computed and marked as belonging to the branch.

    Only its subclass in `dispatch`, which answers PyTorch's functions, has instances.
    """

    is_deferred = True
    _node: Node
    _number: int
    """Which of `tensors_in` the result of the call it is."""


def value(placeholder: Placeholder) -> Tensor:
    """The tensor that `placeholder` stands for, computed now if it was not before."""
    node = placeholder._node
    node.result()
    if len(node.tensors) != node.results:
        raise GateError(
            f"{_name(node)} in a closed branch returned {len(node.tensors)} tensors where "
            f"{node.results} were expected: exclude= the block"
        )
    result = node.tensors[placeholder._number]
    if isinstance(result, Placeholder):  # of a function that was given one within an object
        result = value(result)
    if lacks_samples(placeholder, result):
        raise GateError(
            f"block {node.additions[0].name!r} ran on some of the samples only, but a "
            f"value of its branch (shape {list(result.shape)}) is used outside of it, unlike on "
            "the example: give sd.apply an example that takes this path, or exclude= the block"
        )
    return result


def lacks_samples(placeholder: Placeholder, computed: Tensor | None = None) -> bool:
    """Whether a computed value of a branch has only some of the samples, and is used outside of it.

    A value of several branches, such as the input of attention and feed-forward in parallel, is in
    use until the last of them is added.

    Args:
        computed: the value, if it is known.
    """
    additions = placeholder._node.additions
    for addition in additions:
        samples = addition.gate.samples
        if samples is not None and len(samples) != addition.gate.batch and addition.is_over:
            if not all(other.is_over for other in additions):
                return False
            if computed is None:
                computed = placeholder._node.tensors[placeholder._number]
            return computed.shape[:1] == (len(samples),)
    return False


def with_values(values: Any, which: Callable[[Placeholder], bool] | None = None) -> Any:
    """`values`, with tensors in place of placeholders.

    Args:
        which: which placeholders; by default all. Deferred calls that these need are made.
    """

    def real(tensor: Tensor, _: Any) -> Tensor:
        if isinstance(tensor, Placeholder) and (which is None or which(tensor)):
            return value(tensor)
        return tensor

    return map_structure(real, values)


def is_known(placeholder: Placeholder) -> bool:
    """Whether its value is computed already, for all samples."""
    return placeholder._node.done and not lacks_samples(placeholder)


def is_over(placeholder: Placeholder) -> bool:
    """Whether the forward pass that it is of has ended."""
    return placeholder._node.tape.is_over


def operands(values: Iterable[Any]) -> tuple[list[Placeholder], list[Tensor]]:
    """All placeholders, and all computed tensors, in nested tuples, lists, dicts and slices."""
    found: list[Placeholder] = []
    computed: list[Tensor] = []
    _sort(values, found, computed)
    return found, computed


def _sort(values: Iterable[Any], found: list[Placeholder], computed: list[Tensor]) -> None:
    for each in values:
        if isinstance(each, Placeholder):
            found.append(each)
        elif isinstance(each, Tensor):
            computed.append(each)
        elif type(each) in ATOMS:
            continue
        elif isinstance(each, (tuple, list)):
            _sort(each, found, computed)
        elif isinstance(each, dict):
            _sort(each.values(), found, computed)
        elif isinstance(each, slice):
            _sort((each.start, each.stop, each.step), found, computed)


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain attributes of a module, of all modules in it and of the objects that these hold, on
    which the shape of its result may depend; their modes are among them."""
    found: list[Any] = []
    objects: dict[int, Any] = {}
    modules = [module]
    for each in modules:
        own = each.__dict__
        for held in own.values() if each.__class__ not in _SHAPELESS else ():
            kind = type(held)
            if kind in ATOMS:
                found.append(held)
            elif kind not in _NO_SETTINGS:
                if is_plain(held):
                    found.append(held)
                elif _has_attributes(kind):
                    objects[id(held)] = held
        if own["_modules"]:
            modules += [child for child in own["_modules"].values() if child is not None]
    for each in objects.values():
        found += filter(is_plain, vars(each).values())
    return tuple(found)


def is_plain(value: Any) -> bool:
    """Whether `value` is a number, a word, a flag or such, or a tuple of these."""
    kind = type(value)
    return kind in ATOMS or (kind is tuple and ATOMS.issuperset(map(type, value)))


@cache
def _has_attributes(kind: type) -> bool:
    """Whether objects of a class may hold settings, as the configuration of a model does."""
    library = kind.__module__.partition(".")[0]
    others = "builtins", "torch", "stochastic_depth", "logging"
    return library not in others and kind.__dictoffset__ != 0


def _as_given(argument: Any) -> Any:
    """`argument`, with copies of what may change later unnoticed: of lists, to which the model may
    append, and of tensors of inference mode, whose changes in place PyTorch does not count."""
    kind = type(argument)
    if kind is Tensor and argument.is_inference():
        return argument.clone()
    return kind(map(_as_given, argument)) if kind is list or kind is tuple else argument


def _versions(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Each of `tensors` with the number of its changes in place, where PyTorch counts them."""
    return [(tensor, changes_of(tensor)) for tensor in tensors if not tensor.is_inference()]


def _name(node: Node) -> str:
    if node.module is not None:
        return type(node.module).__name__
    return getattr(node.function, "__name__", "a function")


def _context() -> tuple[Any, ...]:
    """The current gradient mode, and the dtype of autocast on each device, or False."""
    return torch.is_grad_enabled(), _autocast("cpu"), _autocast("cuda")


def _autocast(device: str) -> torch.dtype | bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


@contextmanager
def under(context: tuple[Any, ...], grad: bool = True) -> Iterator[None]:
    """While entered, the gradient mode and autocast are those of `context`.

    Args:
        grad: whether `context` begins with a gradient mode; if not, the current one stays.
    """
    if grad and context == _context():
        yield
        return
    with ExitStack() as entered:
        if grad:
            entered.enter_context(torch.set_grad_enabled(context[0]))
            context = context[1:]
        for device, dtype in zip(("cpu", "cuda"), context, strict=True):
            if dtype != _autocast(device):
                on = torch.autocast(device, dtype=dtype or None, enabled=bool(dtype))
                entered.enter_context(on)
        yield
