"""The shape, dtype and device of placeholders, inferred without computing their values.

A deferred call is made on fake tensors, which have a shape and no values. In place of a module, a
copy is called that has fake tensors too, no hooks, and containers of its own, so that nothing which
its forward method changes is that of the module. Results are cached by module or function, by the
shapes of the arguments, by the plain attributes of the module, and by the values of small tensors
if they were asked for.
"""

import copy
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.surgery.deferred.placeholder import (
    Node,
    Placeholder,
    Reason,
    because,
    in_order,
    under,
    value,
    with_values,
)
from stochastic_depth.surgery.model_state import (
    COLLECTIONS,
    has_content,
    is_object,
    preserved_randomness,
)
from stochastic_depth.tensors import ATOMS, attributes, tensors_in
from stochastic_depth.torch_private import (
    FakeTensorMode,
    no_modes,
    set_call,
    tree_flatten,
    unlogged_fake_tensors,
)

SHAPES = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex"}
SHAPES |= {"__len__", "element_size", "get_device", "is_contiguous", "stride", "is_signed"}
SHAPES |= {"shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "names", "is_meta"}
SHAPES |= {"is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested"}
SHAPES |= {"is_mkldnn", "is_sparse_csr", "is_same_size", "is_inference", "is_conj", "is_neg"}
"""Methods and attributes that can be answered from the shape and the dtype."""
_UNKNOWN: Any = object()
"""Cached in place of shapes that cannot be inferred."""
_BY_VALUES: Any = object()
"""Cached in place of shapes that depend on the values of small tensors."""
_MODULES: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
_FUNCTIONS: dict[Any, dict[Any, Any]] = {}
_FEW = 64
"""How many integers a tensor may have of which the values are kept."""
_one_thread = threading.RLock()
"""Held while fake tensors are used: their mode works in one thread at a time."""


@cache
def _fake_tensors() -> FakeTensorMode:
    """The mode for fake tensors, created when first needed: it imports PyTorch's compiler."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@dataclass(frozen=True, eq=False)
class Shapes:
    """What is known of the result of a call that is not made.

    Attributes:
        leaves: its leaves, with fake tensors in place of tensors.
        structure: how they are nested.
        tensors: the fake tensors in it.
        signatures: the `_signature` of each, with which shapes are looked up.
    """

    leaves: list[Any]
    structure: Any
    tensors: list[Tensor]
    signatures: list[Any]

    @classmethod
    def of(cls, result: Any) -> "Shapes":
        """The shapes of `result`, whose tensors are fake."""
        leaves, structure = tree_flatten(result)
        tensors = tensors_in(result)
        return cls(leaves, structure, tensors, [_signature(tensor) for tensor in tensors])


def shapes_of(node: Node) -> Shapes:
    """The shapes of the result of `node`.

    Raises:
        TypeError: when they cannot be inferred.
    """
    for each in in_order(node, lambda node: node.done or node.shapes is not None):
        try:
            each.shapes = _look_up(each)
        except Exception:
            each.shapes = _UNKNOWN
    if node.shapes is _UNKNOWN:
        raise TypeError("not known without computing it")
    return node.shapes


def _look_up(node: Node) -> Any:
    module = node.module
    key: Any = (_signature(node.args), _signature(node.kwargs), node.context)
    if module is None:
        known = _FUNCTIONS.setdefault(node.function, {})
    else:
        known = _MODULES.setdefault(module, {})
        key = (node.settings, *key)
    shapes = known.get(key)
    if shapes is _BY_VALUES:
        key = key, _values(node)
        shapes = known.get(key)
    if shapes is None:
        if len(known) > 1000:
            known.clear()
        shapes, by_values = _infer(node)
        if by_values:
            known[key] = _BY_VALUES
            key = key, _values(node)
        known[key] = shapes
    return shapes


def _infer(node: Node) -> tuple[Any, bool]:
    """The shapes of the result of `node`, and whether they depend on values of tensors."""
    asks = _Asks()
    try:
        with _one_thread, preserved_randomness():
            twin = _Twins().of
            args, kwargs = twin(node.args), twin(node.kwargs)
            function = node.function if node.module is None else twin(node.module)
            with no_modes(), _fake_tensors(), torch.no_grad(), under(node.context[1:], grad=False):
                with unlogged_fake_tensors(), asks:
                    result = function(*args, **kwargs)
                return Shapes.of(result), asks.values
    except Exception:
        return _UNKNOWN, asks.values


class _Asks(TorchFunctionMode):
    """While entered, notices who asks for the values of a tensor."""

    values = False
    """Whether anyone has asked."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in {"numpy", "__array__"}:
            raise TypeError("NumPy cannot read fake tensors")
        self.values |= name == "tolist"
        return func(*args, **(kwargs or {}))


def _values(node: Node) -> str:
    """The values of the small tensors that a call may read."""
    of_module = (list(node.module.parameters()), list(node.module.buffers())) if node.module else ()
    found = tensors_in((node.args, node.kwargs, of_module))
    small = [t for t in found if not isinstance(t, Placeholder) and _is_small(t)]
    return str([tensor.tolist() for tensor in small])


def shapes_of_tensor(placeholder: Placeholder) -> Shapes | None:
    """The shapes of one placeholder, computed or not; None if they are unknown."""
    try:
        return Shapes.of(_fake(placeholder))
    except Exception:
        return None


def answer_from_shape(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of a function in `SHAPES`; an argument of unknown shape is computed."""
    if len(args) == 1 and args[0]._node.done:
        return func(value(args[0]), **kwargs)
    with _one_thread:
        try:
            twin = _Twins().of
            inferred = ((_fake(args[0]),), {}) if len(args) == 1 else (twin(args), twin(kwargs))
        except Exception:
            with because(Reason("the shape of its output is needed, and depends on its values")):
                inferred = with_values((args, kwargs))
        return func(*inferred[0], **inferred[1])


def requires_grad(placeholder: Placeholder) -> bool:
    """Whether autograd would track the tensor, as far as is known without computing it."""
    node = placeholder._node
    for each in in_order(node, lambda node: node.done or node.needs_grad is not None):
        reads = [tensor for tensor, _ in each.versions]
        reads += () if each.module is None else each.module.parameters()
        each.needs_grad = each.context[0] and (
            any(tensor.requires_grad for tensor in reads)
            or any(map(requires_grad, each.placeholders))
        )
    return value(placeholder).requires_grad if node.done else bool(node.needs_grad)


def _fake(tensor: Tensor) -> Tensor:
    """A fake tensor of the same shape, strides, dtype and device."""
    if isinstance(tensor, Placeholder):
        node = tensor._node
        if node.done:
            return _fake(value(tensor))
        return shapes_of(node).tensors[tensor._number]
    with _one_thread, no_modes(), _fake_tensors():
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _signature(values: Any, objects: int = 2) -> Any:
    """A key that is equal for arguments that lead to the same output shapes.

    It refers to objects of others weakly, so that it does not keep them.

    Args:
        objects: how many levels of objects are looked into.
    """
    if type(values) in ATOMS:
        return type(values), values
    if isinstance(values, Placeholder) and not values._node.done:
        return shapes_of(values._node).signatures[values._number]
    if isinstance(values, Tensor):
        return tuple(values.shape), values.stride(), values.dtype, values.device
    if isinstance(values, tuple | list):
        return type(values), tuple(_signature(each, objects) for each in values)
    if isinstance(values, Mapping):
        return tuple((name, _signature(each, objects)) for name, each in values.items())
    if isinstance(values, slice):
        return _signature((values.start, values.stop, values.step), objects)
    if objects and (inside := attributes(values)):
        return type(values), _signature(inside, objects - 1)
    try:
        return weakref.ref(values)
    except TypeError:  # of a plain value
        return type(values), values


class _Twins:
    """Copies of modules and arguments for one run on fake tensors.

    They share nothing that the run may change: tensors are fake; containers, and the objects of the
    model's author, are copied. A tensor of one value, or of a few integers, is a real copy, because
    code may ask for its values.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}
        """By id: an object, which is kept so that no other object gets its id, and its copy."""

    def of(self, value: Any, objects: int = 2) -> Any:
        """The copy of `value`; `value` itself where a run does not change it.

        Args:
            objects: how many levels of objects are copied.
        """
        if type(value) in ATOMS:
            return value
        if id(value) in self._made:
            return self._made[id(value)][1]
        if isinstance(value, Tensor):
            return self._keep(value, _fake_or_copy(value))
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, slice):
            return slice(*self.of((value.start, value.stop, value.step), objects))
        if isinstance(value, tuple):
            parts = [self.of(each, objects) for each in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if type(value) in COLLECTIONS:
            return self._container(value, objects)
        if objects and is_object(value):
            made = self._keep(value, copy.copy(value))
            vars(made).update({n: self.of(each, objects - 1) for n, each in vars(value).items()})
            return made
        return value

    def _keep(self, value: Any, made: Any) -> Any:
        self._made[id(value)] = value, made
        return made

    def _container(self, value: Any, objects: int) -> Any:
        made = self._keep(value, copy.copy(value))
        if isinstance(value, dict):
            made.update({name: self.of(each, objects) for name, each in value.items()})
        elif not isinstance(value, set):
            made.clear()
            made.extend(self.of(each, objects) for each in value)
        return made

    def _module(self, module: nn.Module) -> nn.Module:
        twin = self._keep(module, module.__class__.__new__(module.__class__))
        for name, held in vars(module).items():
            is_hooks = name.endswith(("_hooks", "_hooks_with_kwargs"))
            twin.__dict__[name] = type(held)() if is_hooks else self.of(held)
        set_call(twin, None)
        return twin


def _fake_or_copy(tensor: Tensor) -> Tensor:
    """A fake tensor, or a real copy of a very small one; itself if it is of another kind."""
    if isinstance(tensor, Placeholder):
        return _fake(_fake(tensor))  # which the run may give another shape, unlike the known one
    if not has_content(tensor):
        return tensor
    if _is_small(tensor):
        return tensor.detach().clone()
    fake = _fake(tensor)
    return nn.Parameter(fake, False) if isinstance(tensor, nn.Parameter) else fake


def _is_small(tensor: Tensor) -> bool:
    """Whether code may ask for the values of a tensor: it has one, or a few integers."""
    return has_content(tensor) and tensor.numel() <= (1 if tensor.is_floating_point() else _FEW)
