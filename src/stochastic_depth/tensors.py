"""The tensors in any value: find them, replace them, compare them."""

import copy
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stochastic_depth.torch_private import tree_flatten, tree_leaves, tree_unflatten

ATOMS = {type(None), bool, int, float, str, torch.dtype, torch.device}
"""Types of values that contain no tensors."""
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
    function: Callable[[Tensor, Hashable], Any], value: Any, key: Hashable = None, objects: int = 0
) -> Any:
    """`value`, with `function(tensor, key)` in place of each tensor in nested containers.

    These are tuples, lists, dicts, slices and what is registered with PyTorch's pytree. They are
    copied, not changed; one in which nothing changes is returned itself, because its owner may
    append to it.

    Args:
        key: the key of `value`; inside it, keys are (key, index) and (key, name).
        objects: how many levels of other objects are looked into.
    """
    kind = type(value)
    if kind is tuple or kind is list:
        parts = [
            each if type(each) in ATOMS else map_structure(function, each, (key, n), objects)
            for n, each in enumerate(value)
        ]
        return value if all(map(is_, parts, value)) else kind(parts)
    if kind in ATOMS:
        return value
    if isinstance(value, Tensor):
        return function(value, key)
    if kind is dict:
        if not value:
            return value
        made = {n: map_structure(function, each, (key, n), objects) for n, each in value.items()}
        return value if all(map(is_, made.values(), value.values())) else made
    if kind is slice:
        ends = value.start, value.stop, value.step
        new = map_structure(function, ends, key, objects)
        return value if new is ends else slice(*new)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # pytree knows no subclass of these
        parts = map_structure(function, tuple(value), key, objects)
        return value if all(map(is_, parts, value)) else kind(*parts)
    leaves, structure = tree_flatten(value, is_leaf=lambda each: each is not value)
    if len(leaves) != 1 or leaves[0] is not value:
        parts = map_structure(function, leaves, key, objects)
        return value if parts is leaves else tree_unflatten(parts, structure)
    inside = attributes(value) if objects and tensors_in(value) else {}
    changed = {
        name: new
        for name, each in inside.items()
        if (new := map_structure(function, each, (key, name), objects - 1)) is not each
    }
    if changed:
        value = copy.copy(value)
        for name, new in changed.items():
            object.__setattr__(value, name, new)  # which works on frozen dataclasses too
    return value


def replace_tensors(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """`value`, with `new(tensor)` in place of each tensor, also in objects; what holds them is
    copied."""
    return map_structure(lambda tensor, _: new(tensor), value, objects=_DEPTH)


class Promotion(NamedTuple):
    """A dtype to which a branch promotes its shortcut, and whether that was under autocast."""

    dtype: str
    """Its name, such as "float32"."""
    autocast: bool


def promoted(tensor: Tensor, dtype: str, autocast: bool) -> Tensor:
    """`tensor` in the dtype that its sum with a value of `dtype` has.

    It is returned as it is where autocast is on, and was not when the promotion was seen, or the
    other way round: then it is not known.

    Args:
        dtype: as `Promotion.dtype`.
        autocast: as `Promotion.autocast`.
    """
    if torch.is_autocast_enabled(tensor.device.type) != autocast:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, getattr(torch, dtype)))


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
            for inside in attributes(leaf).values():
                yield from _tensors(inside, depth + 1, seen)


def attributes(value: object) -> dict[str, Any]:
    """The attributes of an object that is not one of PyTorch's containers."""
    if isinstance(value, _NO_CONTAINERS):
        return {}
    if isinstance(value, tuple):
        return dict(zip(getattr(value, "_fields", ()), value, strict=False))
    if dataclasses.is_dataclass(value):
        fields = (field.name for field in dataclasses.fields(value))
        found = {name: getattr(value, name) for name in fields if hasattr(value, name)}
        return found | getattr(value, "__dict__", {})
    declared = [getattr(cls, "__slots__", ()) for cls in type(value).__mro__]
    slots = [name for names in declared for name in ([names] if isinstance(names, str) else names)]
    values = {name: getattr(value, name) for name in slots if hasattr(value, name)}
    return values | getattr(value, "__dict__", {})
