"""The shape, dtype and device of placeholders, inferred without computing their values.

A deferred call is made on fake tensors, which have a shape and no values. In place of a module, a
copy without hooks is called. Results are cached by module or function and by the shapes of the
arguments.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.surgery.deferred.placeholder import (
    Node,
    Placeholder,
    Reason,
    because,
    mapped,
    operands,
    under,
    value,
    with_values,
)
from stochastic_depth.torch_private import FakeTensorMode, no_modes, set_call, tree_flatten

SHAPES = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex"}
SHAPES |= {"__len__", "element_size", "get_device", "is_contiguous", "stride", "is_signed"}
SHAPES |= {"shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "names", "is_meta"}
SHAPES |= {"is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested"}
SHAPES |= {"is_mkldnn", "is_sparse_csr", "is_same_size", "is_inference", "is_conj", "is_neg"}
"""Methods and attributes that can be answered from the shape and the dtype."""
_UNKNOWN: Any = object()
"""Cached in place of shapes that cannot be inferred."""
_MODULES: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
_FUNCTIONS: dict[Any, dict[Any, Any]] = {}


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
        signatures: the `_signature` of each leaf, with which shapes are looked up.
    """

    leaves: list[Any]
    structure: Any
    signatures: list[Any]

    @classmethod
    def of(cls, result: Any) -> "Shapes":
        """The shapes of `result`, whose tensors are fake."""
        leaves, structure = tree_flatten(result)
        return cls(leaves, structure, [_signature(leaf) for leaf in leaves])


def shapes_of(node: Node) -> Shapes:
    """The shapes of the result of `node`.

    Raises:
        Exception: of any class, when they cannot be inferred.
    """
    if node.shapes is None:
        key = (_signature(node.args), _signature(node.kwargs), node.context)
        if node.module is not None:
            known = _MODULES.setdefault(node.module, {})
            key = (node.module.training, *key)
        else:
            known = _FUNCTIONS.setdefault(node.function, {})
        if key not in known:
            if len(known) > 1000:
                known.clear()
            known[key] = _infer(node)
        node.shapes = known[key]
    if node.shapes is _UNKNOWN:
        raise TypeError("not known without computing it")
    return node.shapes


def _infer(node: Node) -> Any:
    try:
        args, kwargs = mapped(_faked, (node.args, node.kwargs))
        function = node.function if node.module is None else _without_hooks(node.module)
        with no_modes(), _fake_tensors(), torch.no_grad(), under(node.context[1:], grad=False):
            return Shapes.of(function(*args, **kwargs))
    except Exception:
        return _UNKNOWN


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
    try:
        if len(args) == 1 and not kwargs:
            return func(_fake(args[0]))
        inferred = mapped(_faked, args), mapped(_faked, kwargs)
    except Exception:
        with because(Reason("the shape of its output is needed, and depends on its values")):
            inferred = with_values(args, kwargs)
    return func(*inferred[0], **inferred[1])


def requires_grad(placeholder: Placeholder) -> bool:
    """Whether autograd would track the tensor, as far as is known without computing it."""
    node = placeholder._node
    if node.done:
        return value(placeholder).requires_grad
    if not node.context[0]:
        return False
    if node.module is not None and any(p.requires_grad for p in node.module.parameters()):
        return True
    found, computed = operands((node.args, node.kwargs))
    return any(tensor.requires_grad for tensor in computed) or any(map(requires_grad, found))


def _faked(given: Tensor | nn.Module) -> Tensor | nn.Module:
    return _without_hooks(given) if isinstance(given, nn.Module) else _fake(given)


def _fake(tensor: Tensor) -> Tensor:
    """A fake tensor of the same shape, strides, dtype and device."""
    if isinstance(tensor, Placeholder):
        node = tensor._node
        if node.done:
            return _fake(value(tensor))
        fake = shapes_of(node).leaves[max(0, tensor._leaf)]
        if not isinstance(fake, Tensor):
            raise TypeError("not a tensor")
        return fake
    with no_modes(), _fake_tensors():
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _signature(values: Any) -> Any:
    """A key that is equal for arguments that lead to the same output shapes."""
    if isinstance(values, Placeholder) and not values._node.done:
        return shapes_of(values._node).signatures[max(0, values._leaf)]
    if isinstance(values, Tensor):
        return tuple(values.shape), values.stride(), values.dtype, values.device
    if isinstance(values, tuple | list):
        return type(values), tuple(_signature(each) for each in values)
    if isinstance(values, Mapping):
        return tuple((name, _signature(each)) for name, each in values.items())
    if isinstance(values, slice):
        return _signature((values.start, values.stop, values.step))
    return type(values), values


def _without_hooks(module: nn.Module) -> nn.Module:
    """A copy of `module` with the same tensors and no hooks, to be run on fake tensors."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for name in vars(module):
        if name.endswith(("_hooks", "_hooks_with_kwargs")):
            twin.__dict__[name] = type(vars(module)[name])()
    set_call(twin, None)
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = {
        name: child if child is None else _without_hooks(child)
        for name, child in module._modules.items()
    }
    return twin
