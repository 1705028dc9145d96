"""The tensors in any value: find them, replace them, compare them."""

import copy
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.torch_private import tree_leaves, tree_map

_DEPTH = 4
"""How many levels of nested objects are searched."""
_NO_CONTAINERS = (
    bool | int | float | complex | str | bytes | type(None) | type | Callable | nn.Module
    | torch.dtype | torch.device | torch.Size | torch.Generator
)  # fmt: skip


def tensors_in(value: object) -> list[Tensor]:
    """All tensors in `value`, in order.

    They are searched for in tuples, lists, mappings and everything else that is registered with
    PyTorch's pytree; in dataclasses; and in the attributes of any other object.
    """
    return [value] if isinstance(value, Tensor) else list(_tensors(value, 0, set()))


def in_graph(value: object) -> list[Tensor]:
    """The computed tensors in `value` that have a grad_fn."""
    return [tensor for tensor in computed_tensors_in(value) if tensor.grad_fn is not None]


def computed_tensors_in(value: object) -> list[Tensor]:
    """The tensors in `value` except placeholders, of which most attributes need their values."""
    return [t for t in tensors_in(value) if not getattr(type(t), "is_deferred", False)]


def copied(model: nn.Module) -> nn.Module:
    """`copy.deepcopy(model)`, also of a model that keeps tensors which it has computed.

    Such are the weights of `torch.nn.utils.spectral_norm`, which each pass computes again.
    """
    kept = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in kept if not t.is_leaf})


def map_structure(
    function: Callable[[Any, Hashable], Any], value: Any, key: Hashable = None
) -> Any:
    """`value`, with `function(leaf, key)` in place of each leaf of nested tuples, lists and dicts.

    A tuple or list in which nothing changes is returned itself, because its owner may append to it.

    Args:
        key: the key of `value`; inside it, keys are (key, index) and (key, name).
    """
    if type(value) in (tuple, list):
        parts = [map_structure(function, each, (key, n)) for n, each in enumerate(value)]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        return type(value)(parts) if changed else value
    if type(value) is dict:
        return {name: map_structure(function, each, (key, name)) for name, each in value.items()}
    return function(value, key)


def replace_tensors(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """`value`, with `new(tensor)` in place of each tensor; containers are copied, not changed."""
    return _replaced(value, new, 0)


def largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest difference between two lists of tensors, relative to each tensor's largest value.

    It is infinite if a number is compared with nan or an infinity, and if the shapes or the numbers
    of tensors differ.
    """
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in found]:
        return math.inf
    largest = 0.0
    for old, new in zip(expected, found, strict=True):
        if not old.numel() or torch.equal(old, new):
            continue
        exact = torch.complex128 if old.is_complex() else torch.float64
        old, new = old.detach().to(exact), new.detach().to(exact)
        same = (old == new) | (old.isnan() & new.isnan())
        apart = (new - old).abs()[~same]
        if apart.numel():
            finite = old[old.isfinite()].abs()
            scale = max(finite.max().item() if finite.numel() else 0.0, 1e-30)
            relative = apart.nan_to_num(nan=torch.inf).max().item() / scale
            largest = max(largest, relative)
    return largest


def _tensors(value: object, depth: int, seen: set[int]) -> Iterator[Tensor]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth < _DEPTH and id(leaf) not in seen:
            seen.add(id(leaf))
            for inside in _attributes(leaf).values():
                yield from _tensors(inside, depth + 1, seen)


def _replaced(value: Any, new: Callable[[Tensor], Tensor], depth: int) -> Any:
    def replaced_in_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return new(leaf)
        attributes = _attributes(leaf) if depth < _DEPTH else {}
        changed = {
            name: after
            for name, inside in attributes.items()
            if (after := _replaced(inside, new, depth + 1)) is not inside
        }
        if not changed:
            return leaf
        leaf = copy.copy(leaf)
        for name, inside in changed.items():
            object.__setattr__(leaf, name, inside)  # which works on frozen dataclasses too
        return leaf

    if isinstance(value, Tensor):
        return new(value)
    if not tensors_in(value):
        return value
    return tree_map(replaced_in_leaf, value)


def _attributes(value: object) -> dict[str, Any]:
    """The attributes of an object that is not one of PyTorch's containers."""
    if isinstance(value, _NO_CONTAINERS):
        return {}
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value))
        found = {name: getattr(value, name) for name in fields if hasattr(value, name)}
        return found | getattr(value, "__dict__", {})
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    values = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return values | getattr(value, "__dict__", {})
