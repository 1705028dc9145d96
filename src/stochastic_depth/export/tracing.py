"""Watch one forward pass in its elementary operations: what each value was computed from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(eq=False)
class Value:
    """A tensor: one of the `state_dict`, an input or constant, or the result of an operation."""

    operation: str = ""
    """Its name in PyTorch's schema, without namespace and the mark of working in place."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """By name, with values in place of tensors."""
    state: str = ""
    """Its name in the `state_dict`."""
    single: bool = False
    """Whether it is less precise than float64."""
    users: list["Value"] = field(default_factory=list)

    def operands(self) -> Iterator["Value"]:
        """All values that it was computed from directly."""
        yield from operands(self.arguments)


def operands(arguments: object) -> Iterator[Value]:
    """The values in nested containers."""
    return (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Value))


def ancestors(values: Sequence[Value]) -> set[Value]:
    """What `values` were computed from, themselves included."""
    seen, ahead = set(values), list(values)
    while ahead:
        for operand in ahead.pop().operands():
            if operand not in seen:
                seen.add(operand)
                ahead.append(operand)
    return seen


@dataclass(frozen=True)
class Scaled:
    """A branch's output, times the factor of its gate."""

    branch: Value
    product: Value
    result: Tensor


class Trace(TorchDispatchMode):
    """While entered, notes every value, and what is multiplied by one of `factors`.

    Args:
        model: whose `state_dict` has names for tensors.
        factors: of the gates, [] each.
    """

    def __init__(self, model: nn.Module, factors: Sequence[Tensor]) -> None:
        super().__init__()
        self.scaled: list[list[Scaled]] = [[] for _ in factors]
        """For each factor, in order of execution."""
        self.single = False
        """Whether something was computed in less than float64."""
        self._factors = {id(factor): number for number, factor in enumerate(factors)}
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []
        for name, tensor in model.state_dict(keep_vars=True).items():
            if id(tensor) not in self._values:
                self._note(tensor, Value(state=name))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        given = {a.name: arg for a, arg in zip(func._schema.arguments, args, strict=False)}
        given |= kwargs
        arguments = tree_map_only(Tensor, self._value, given)
        out: Any = func(*args, **kwargs)
        operation = func._schema.name.partition("::")[2].rstrip("_")
        # Of several results the first is what is computed; the others are indices or statistics.
        for tensor in tree_leaves(out[0] if isinstance(out, tuple) else out):
            if isinstance(tensor, Tensor):
                made = self._note(tensor, Value(operation, arguments))
                made.single = tensor.is_floating_point() and tensor.dtype != torch.float64
                self.single |= made.single
                for operand in set(made.operands()):
                    operand.users.append(made)
        number = self._factors.get(id(given.get("other")))
        if operation == "mul" and number is not None and isinstance(out, Tensor):
            product = self._value(out)
            self.scaled[number].append(Scaled(arguments["self"], product, out.clone()))
        return out

    def _value(self, tensor: Tensor) -> Value:
        return self._values.get(id(tensor)) or self._note(tensor, Value())

    def _note(self, tensor: Tensor, value: Value) -> Value:
        self._kept.append(tensor)  # so that no other one gets its identity
        self._values[id(tensor)] = value
        return value
