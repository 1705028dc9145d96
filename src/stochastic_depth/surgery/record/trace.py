"""Record one forward pass: which value is computed from which, in which module, at what cost."""

import heapq
import itertools
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.residual import works_in_place
from stochastic_depth.surgery.addition_functions import ADDITIONS, by_position, scales_second
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.tensors import tensors_in
from stochastic_depth.torch_private import changes_of, is_called_by_compiled

PRODUCT = "product of addcmul"
"""The name recorded for the function that made the product in `addcmul`."""
_CACHED_REACHES = 16
"""How many results of `Recording.reach` are kept: as many as judging one addition asks for."""


@dataclass(eq=False)
class Call:
    """One call of a module. Values are given by their numbers in the recording."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: set[int]
    """The numbers of the tensors in its arguments."""
    began: int
    """The number of the first value that is computed during the call."""
    serial: int = 0
    """The number of this call in the forward pass."""
    parent: "Call | None" = None
    children: "list[Call]" = field(default_factory=list)
    """The calls that it makes itself, in order."""
    ended: int = sys.maxsize
    """The number of the first value that is computed after the call; larger than all numbers until
    it returns."""
    outputs: set[int] = field(default_factory=set)
    """The numbers of the tensors that it returned."""
    compiled: bool = False
    """Whether a function that torch.compile compiles makes it, within the call around it."""
    returned_tensor: bool = False
    """Whether it returned a tensor, rather than a tuple or another structure."""

    def ancestors(self) -> "Iterator[Call]":
        """The calls around this one, innermost first."""
        call = self.parent
        while call is not None:
            yield call
            call = call.parent

    def is_within(self, other: "Call") -> bool:
        return any(call is other for call in self.ancestors())

    @property
    def earliest(self) -> int:
        """The number of the first of its inputs, and of the values that are computed during it."""
        return min([self.began, *self.inputs])


def calls_during(calls: Sequence[Call], first: int, last: int) -> Iterator[Call]:
    """Those of `calls`, and the calls within them, that run while any of the values from `first` to
    `last` is computed; inner calls come before those around them."""
    start = bisect_right(calls, first, key=lambda call: call.ended)
    stop = bisect_right(calls, last, key=lambda call: call.began)
    for call in calls[start:stop]:
        yield from calls_during(call.children, first, last)
        yield call


@dataclass
class Value:
    """A tensor, and the function that computed it."""

    tensor: Tensor
    """Kept alive, so that its `id` is not reused."""
    parents: tuple[int, ...]
    """The numbers of the values that it was computed from."""
    made_by: str
    """The name of the function; "unseen" if no function was seen, empty for inputs and
    parameters."""
    flops: int
    children: list[int] = field(default_factory=list)
    together: range = range(0)
    """The numbers of all values that the function returned in the same call."""
    compiled: bool = False
    """Whether a function that torch.compile compiles computes it, within the call around it."""


@dataclass(frozen=True)
class Change:
    """A change of a tensor in place."""

    at: int
    """How many values were recorded before."""
    function: str
    """The name of the function that makes the change."""
    call: Call | None
    """The innermost module call during which it is made."""


class Recording:
    """All values and module calls of a forward pass, numbered in the order of computation."""

    def __init__(self, model: nn.Module) -> None:
        self.values: list[Value] = []
        self.calls: list[Call] = []
        """The running calls, innermost last."""
        self.outermost: list[Call] = []
        """The calls that are not made within other calls, in order."""
        self.serial = itertools.count()
        self.may_change = works_in_place(model)
        """Whether any module works in place, even if in training mode only."""
        self._changes: dict[int, list[Change]] = {}
        """For each tensor that was changed in place, by its `id`: the changes, in order."""
        self._reached: dict[tuple[int, int], frozenset[int]] = {}
        """What `reach` has returned recently, by its arguments."""
        self._number: dict[int, int] = {}
        self._aliases: list[Tensor] = []
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._constants = {id(tensor) for tensor in _held_by(model)}

    def number(self, tensor: Tensor) -> int:
        """The number of a value; a tensor that no function has returned becomes a new value."""
        known = self._number.get(id(tensor))
        if known is not None:
            return known
        latest = len(self.values) - 1
        if not self.calls or id(tensor) in self._constants or latest < 0:
            return self.add(tensor, ())
        return self.add(tensor, (latest,), "unseen")  # for example by a scripted function

    def alias(self, tensor: Tensor, of: Tensor) -> None:
        """Record that two tensors are the same value."""
        self._number[id(tensor)] = self.number(of)
        self._aliases.append(tensor)

    def record_change(self, tensor: Tensor, function: str) -> None:
        """Record that a function has changed one of its arguments in place."""
        call = self.calls[-1] if self.calls else None
        change = Change(len(self.values), function, call)
        self._changes.setdefault(id(_viewed(tensor)), []).append(change)

    def changes(self, value: int) -> list[Change]:
        """The changes in place of a value, or of views of it."""
        return self._changes.get(id(_viewed(self.values[value].tensor)), [])

    def is_changed_later(self, value: int) -> bool:
        """Whether a later function changes a value, or a view of it, in place."""
        return self.may_change or any(change.at > value for change in self.changes(value))

    def record_changed_value(
        self, tensor: Tensor, parents: tuple[int, ...], function: str, flops: int, known: bool
    ) -> None:
        """Record the value that a tensor has after a function has changed it in place.

        If it is a view, the tensor that it is a view of has a new value, too, to which the old one
        contributes what the view leaves out. What the model holds from pass to pass, such as a
        running mean, keeps its number.

        Args:
            known: whether the function has returned the tensor, and so the value is recorded.
        """
        viewed = _viewed(tensor)
        if id(viewed) in self._constants:
            return
        if not known:
            self.add(tensor, parents, function, flops)
        if viewed is not tensor:
            kept = () if tensor.numel() == viewed.numel() else (self.number(viewed),)
            number = self.add(viewed, (*kept, self.number(tensor)), function)
            self.add(tensor, (number,), function)

    def numbers(self, values: object) -> set[int]:
        """The numbers of all tensors in `values`."""
        return {self.number(tensor) for tensor in tensors_in(values)}

    def add(
        self, tensor: Tensor, parents: tuple[int, ...], made_by: str = "", flops: int = 0
    ) -> int:
        """Record a new value, and return its number."""
        number = self._number[id(tensor)] = len(self.values)
        self.values.append(Value(tensor, parents, made_by, flops))
        for parent in parents:
            self.values[parent].children.append(number)
        return number

    def reach(self, value: int, until: int = 0) -> frozenset[int]:
        """`value` and the values that it was computed from, back to the value `until`."""
        known = self._reached.get((value, until))
        if known is None:
            seen, ahead = {value}, [value]
            while ahead:
                for parent in self.values[ahead.pop()].parents:
                    if parent >= until and parent not in seen:
                        seen.add(parent)
                        ahead.append(parent)
            if len(self._reached) == _CACHED_REACHES:
                self._reached.clear()
            known = self._reached[value, until] = frozenset(seen)
        return known

    def reach_within(self, value: int, call: Call) -> frozenset[int]:
        """`value` and the values that it was computed from, back to the inputs of `call`."""
        return self.reach(value, call.earliest)

    def reach_without(self, value: int, other: int, call: Call) -> frozenset[int]:
        """As `reach_within`, without `other` and the values that it was computed from.

        Values are followed from the latest to the earliest, and no further than to where all are
        of `other`, so that the work for a branch does not grow with the depth of the model.
        """
        until, found, of_other, ahead = call.earliest, set[int](), {other}, [-value, -other]
        seen, unknown = {value, other}, int(value != other)
        heapq.heapify(ahead)
        while unknown:
            number = -heapq.heappop(ahead)
            is_of_other = number in of_other
            if not is_of_other:
                found.add(number)
                unknown -= 1
            for parent in self.values[number].parents:
                if parent < until:
                    continue
                if parent not in seen:
                    heapq.heappush(ahead, -parent)
                    seen.add(parent)
                    unknown += 1
                if is_of_other and parent not in of_other:
                    of_other.add(parent)
                    unknown -= 1
        return frozenset(found)

    def functions(self, values: Set[int]) -> list[str]:
        """The names of the functions that computed these values."""
        return [self.values[value].made_by for value in values]

    def parameters(self, values: Set[int]) -> frozenset[str]:
        """The names of the parameters among these values and those that they were computed from."""
        parents = {parent for value in values for parent in self.values[value].parents}
        ids = (id(self.values[value].tensor) for value in values | parents)
        return frozenset(self._parameters[each] for each in ids if each in self._parameters)

    def numbers_of_parameters(self) -> dict[str, int]:
        """The number of each parameter that was used, by its name."""
        numbers = ((name, self._number.get(each)) for each, name in self._parameters.items())
        return {name: number for name, number in numbers if number is not None}


@contextmanager
def recorded(
    model: nn.Module,
    recording: Recording,
    on_function: Callable[[Callable[..., Any], tuple[int | None, ...], Any, bool], None],
    count_flops: bool,
    gradients: bool,
) -> Iterator[None]:
    """While entered, record what `model` computes in `recording`.

    Args:
        on_function: called after every function, with the function, the numbers of its positional
            arguments (None for arguments that are not tensors), its result, and whether it is an
            addition that multiplies its second operand.
        gradients: whether autograd is enabled.
    """
    with ExitStack() as entered:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            for handle in _hooks(name, module, recording):
                entered.callback(handle.remove)
        entered.enter_context(torch.set_grad_enabled(gradients))
        counter = entered.enter_context(CountFlops()) if count_flops else None
        entered.enter_context(_Functions(recording, on_function, counter))
        yield


def _held_by(model: nn.Module) -> Iterator[Tensor]:
    """The tensors that the modules of `model` hold as parameters, buffers and attributes."""
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule):
            yield from tensors_in([module._parameters, module._buffers])
            yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def _viewed(tensor: Tensor) -> Tensor:
    """The tensor of which `tensor` is a view; or `tensor` itself."""
    return tensor if tensor._base is None else tensor._base


def _is_zero(value: object) -> bool:
    return type(value) is int and value == 0


class _Functions(TorchFunctionMode):
    """Records every function of PyTorch that is called."""

    def __init__(
        self, recording: Recording, on_function: Callable[..., None], counter: CountFlops | None
    ) -> None:
        super().__init__()
        self.recording, self.on_function, self.counter = recording, on_function, counter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        inputs = tensors_in((args, kwargs))
        parents = tuple(map(self.recording.number, inputs))
        given = args
        if kwargs and name in ADDITIONS:
            given, _ = by_position(args, kwargs)
        operands = tuple(self.recording.number(x) if isinstance(x, Tensor) else None for x in given)
        if name.startswith("addcmul"):
            parents = operands = self.recording.number(given[0]), self._product(given[1:3])
        before = 0 if self.counter is None else self.counter.total
        counted = [(x, changes_of(x)) for x in inputs if not x.is_inference()]
        out = func(*args, **(kwargs or {}))
        flops = 0 if self.counter is None else self.counter.total - before
        changed = [tensor for tensor, changes in counted if changes_of(tensor) != changes]
        for tensor in changed:
            self.recording.record_change(tensor, name or "a function")
        if name in ("__radd__", "add") and len(args) == 2 and _is_zero(args[1]):  # as sum() begins
            self.recording.alias(out, args[0])
            self.on_function(func, operands, out, False)
            return out
        first, tensors = len(self.recording.values), tensors_in(out)
        compiled = is_called_by_compiled(sys._getframe())
        for tensor in tensors:
            value = self.recording.values[self.recording.add(tensor, parents, name, flops)]
            value.together, value.compiled = range(first, first + len(tensors)), compiled
            flops = 0
        self.on_function(func, operands, out, scales_second(name, kwargs or {}))
        returned = set(map(id, tensors))
        for tensor in changed:  # after the result has been judged, under the number that it has now
            self.recording.record_changed_value(
                tensor, parents, name, flops, id(tensor) in returned
            )
        return out

    def _product(self, factors: Sequence[Tensor]) -> int:
        """Record the product that `addcmul` adds, as if it had been computed before."""
        parents = tuple(map(self.recording.number, factors))
        return self.recording.add(factors[0] * factors[1], parents, PRODUCT)


def _hooks(name: str, module: nn.Module, recording: Recording) -> tuple[Any, Any]:
    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs = recording.numbers((args, kwargs))
        began = len(recording.values)
        parent = recording.calls[-1] if recording.calls else None
        call = Call(name, module, args, kwargs, inputs, began, next(recording.serial), parent)
        call.compiled = is_called_by_compiled(sys._getframe(), calls=1)
        (recording.outermost if parent is None else parent.children).append(call)
        recording.calls.append(call)

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        if not recording.calls or recording.calls[-1].module is not module:
            return  # a hook before `begin` raised an exception
        call = recording.calls.pop()
        call.outputs, call.returned_tensor = recording.numbers(output), isinstance(output, Tensor)
        call.ended = len(recording.values)

    return (
        module.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(end, always_call=True),  # its caller may catch an exception
    )
