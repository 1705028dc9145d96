"""What PyTorch's functions do with placeholders: defer the call, answer it, or compute.

`defer_call` and `mark_as_branch` create placeholders. Every function that is called with one
arrives at `__torch_function__`, which decides:

- A question for a shape, dtype or device is answered without computing anything.
- The residual addition of the branch is made by `add` of `gates`: the sum, or the shortcut.
- A function that needs the values of a tensor, such as `.item()` or an `if`, computes them
  immediately; so does any use after the forward pass.
- After a change in place, the placeholder stands for the changed tensor.
- Any other call is deferred too; or it is made at once, if all of its placeholders are computed.
  Either way the result is a placeholder.
"""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stochastic_depth.surgery.addition_functions import ADDITIONS, by_position
from stochastic_depth.surgery.deferred.gates import (
    add,
    addition_at,
    additions_of,
    note_if_without_graph,
    selected_values,
)
from stochastic_depth.surgery.deferred.placeholder import (
    GatedAddition,
    Node,
    Placeholder,
    Reason,
    Tape,
    because,
    is_over,
    lacks_samples,
    operands,
    value,
    with_values,
)
from stochastic_depth.surgery.deferred.shapes import (
    SHAPES,
    answer_from_shape,
    requires_grad,
    shapes_of,
    shapes_of_tensor,
)
from stochastic_depth.surgery.frames import CallSite, call_site_of
from stochastic_depth.tensors import map_structure, replace_tensors
from stochastic_depth.torch_private import subclass_of, tree_unflatten

LAZY = {"T", "mT", "H", "mH", "real", "imag", "data"}
"""Attributes that are tensors themselves."""
ASKS = {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__repr__"}
ASKS |= {"__format__", "__deepcopy__", "__reduce_ex__", "__array__", "__dlpack__", "item", "tolist"}
ASKS |= {"numpy", "equal", "allclose", "is_nonzero", "data_ptr", "storage", "untyped_storage"}
ASKS |= {"backward", "retain_grad", "register_hook", "nonzero", "unique", "masked_select"}
ASKS |= {"storage_offset", "share_memory_", "pin_memory", "is_pinned", "_typed_storage"}
ASKS |= {"unique_consecutive", "argwhere", "bincount", "__array_wrap__", "is_set_to", "is_shared"}
"""Functions and attributes that need the values of a tensor, or whose result has a shape that
depends on the values."""
IN_PLACE = {f"__i{name}__" for name in "add sub mul truediv floordiv mod and or xor pow".split()}
IN_PLACE |= {"__setitem__", "__ilshift__", "__irshift__", "__imatmul__"}
"""Functions that change their first argument, in addition to those whose names end with "_"."""
RESHAPES = {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "resize_"}
RESHAPES |= {"resize_as_", "as_strided_", "set_"}
"""Functions that change the shape of their first argument, and not only its values."""
SEVERAL = {"chunk", "split", "unbind", "split_with_sizes", "tensor_split", "topk", "sort", "max"}
SEVERAL |= {"min", "median", "mode", "kthvalue", "cummax", "cummin", "std_mean", "var_mean", "qr"}
SEVERAL |= {"svd", "eigh", "eig", "lu", "aminmax", "broadcast_tensors", "meshgrid", "frexp"}
SEVERAL |= {"hsplit", "vsplit", "dsplit", "slogdet", "unsafe_chunk", "unsafe_split", "lstm", "gru"}
SEVERAL |= {"multi_head_attention_forward", "native_layer_norm", "native_batch_norm", "where"}
SEVERAL |= {"max_pool1d", "max_pool2d", "max_pool3d", "lstsq", "nanmedian", "rnn_tanh", "rnn_relu"}
"""Functions that may return several tensors. Their shapes are inferred at once, to find out how
many."""
_HIDDEN = Reason(
    "the structure of its output is known only after computing it (that of a packed sequence, for "
    "example, depends on the lengths)",
    hides_structure=True,
)
"""The reason for making a call immediately that could have been deferred."""
_NOTHING = torch.empty(0, device="meta")
"""The storage of every placeholder."""


class _Dispatching(Placeholder):
    """The class of every placeholder; it answers PyTorch's functions."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__
            if name == "requires_grad":
                return requires_grad(args[0])
            if name not in LAZY and name not in SHAPES:
                name = "item"  # for example `grad`, which needs the tensor itself
        if name in SHAPES:
            return answer_from_shape(func, args, kwargs)
        needs = operands((args, kwargs) if kwargs else args)
        found = needs[0]
        if any(map(is_over, found)):
            args, kwargs = with_values((args, kwargs), is_over)
            return func(*args, **kwargs)
        additions = additions_of(found)
        if name in ADDITIONS and additions:
            args, kwargs = by_position(args, kwargs)
            site = _caller()
            addition = addition_at(additions, site, args)
            if addition is not None:
                return add(addition, addition.sites[site], func, name, args, kwargs)
        if name in ASKS or name == "__set__" or not additions:
            with because(Reason(f"the values of its output are needed ({name})")):
                args, kwargs = with_values((args, kwargs))
            return func(*args, **kwargs)
        in_place = name in IN_PLACE or (name[-1:] == "_" and name[-2:] != "__")
        if in_place or kwargs.get("inplace") or kwargs.get("out") is not None:
            return _change(func, additions, found, args, kwargs, _caller())
        if all(p._node.done for p in found) and not any(map(lacks_samples, found)):
            args, kwargs = selected_values((args, kwargs), additions, _caller)
            return mark_as_branch(found[0]._node.tape, additions, func(*args, **kwargs))
        node = Node(found[0]._node.tape, additions, func, args, kwargs, needs)
        if name in SEVERAL or name == "":
            return defer_call(node)
        return placeholder_of(node)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(value(self))


def defer_call(node: Node, gives_tensor: bool = False) -> Any:
    """The result of a call that is not made: its structure, with placeholders in place of tensors.

    If the structure cannot be inferred, the call is made.

    Args:
        gives_tensor: whether to assume, in that case, that the result is one tensor.
    """
    try:
        shapes = shapes_of(node)
    except Exception:
        if gives_tensor:
            return placeholder_of(node)
        with because(_HIDDEN):
            return mark_as_branch(node.tape, node.additions, node.result())
    if shapes.structure.num_nodes == 1 and isinstance(shapes.leaves[0], Tensor):
        return placeholder_of(node)
    node.results = len(shapes.tensors)
    numbers = {id(tensor): n for n, tensor in enumerate(shapes.tensors)}

    def placeholder(tensor: Tensor) -> Placeholder:
        return placeholder_of(node, numbers[id(tensor)])

    made = [
        placeholder(leaf) if isinstance(leaf, Tensor) else replace_tensors(leaf, placeholder)
        for leaf in shapes.leaves
    ]
    return tree_unflatten(made, shapes.structure)


def mark_as_branch(tape: Tape, additions: tuple[GatedAddition, ...], result: Any) -> Any:
    """A computed `result`, with its tensors marked as belonging to the branches of `additions`."""
    if not torch.is_grad_enabled():
        note_if_without_graph(additions)
    if isinstance(result, Tensor):
        return placeholder_of(Node.finished(tape, additions, result))
    if isinstance(result, tuple | list | dict) or dataclasses.is_dataclass(result):
        return replace_tensors(result, lambda tensor: mark_as_branch(tape, additions, tensor))
    return result


def placeholder_of(node: Node, number: int = 0) -> Placeholder:
    """The placeholder for one of the tensors in the result of `node`."""
    made = subclass_of(_Dispatching, _NOTHING)
    made._node, made._number = node, number
    return made


def _change(
    func: Any,
    additions: tuple[GatedAddition, ...],
    found: list[Placeholder],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    site: CallSite,
) -> Any:
    """Make or defer `func(*args, **kwargs)`, which changes a tensor in place, at `site`.

    A placeholder that is changed stands for the changed tensor from then on.
    """
    target = kwargs.get("out") if kwargs.get("out") is not None else args[0]
    if not isinstance(target, Placeholder) or all(p._node.done for p in found):
        new_args, new_kwargs = selected_values((args, kwargs), additions, lambda: site)
        result = func(*new_args, **new_kwargs)
        return target if result is not None else None
    before = placeholder_of(target._node, target._number)
    args, kwargs = map_structure(lambda t, _: before if t is target else t, (args, kwargs))
    node = Node(target._node.tape, additions, func, args, kwargs, operands((args, kwargs)))
    if func.__name__ == "__setitem__":  # which returns None
        node.function = _set_item
    if func.__name__ not in RESHAPES:
        node.shapes = shapes_of_tensor(before)
    node.tape.in_place.append(node)
    node.tape.changes_computed |= target._node.done
    target._node, target._number = node, 0
    return target


def _set_item(target: Tensor, key: Any, new: Any) -> Tensor:
    target[key] = new
    return target


def _caller() -> CallSite:
    """The call site of the function that `__torch_function__` handles."""
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return call_site_of(frame)
