"""A tensor that is not computed unless somebody asks for it.

What is computed from a `Placeholder` is a placeholder, until a residual addition takes it for the
branch that it stands for. Its shape, dtype and device are inferred without computing it, once for
each kind of inputs. An item, a comparison that Python branches on, an output of the model: whoever
needs numbers gets them, computed then by the operations that the model itself has called.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.errors import GateError
from stochastic_depth.gates import Gate
from stochastic_depth.surgery.edits import ADDITIONS, Site, site_of
from stochastic_depth.surgery.subset import samples
from stochastic_depth.surgery.trace import IN_PLACE
from stochastic_depth.torch_private import (
    FakeTensorMode,
    changes_of,
    no_modes,
    recomputation,
    set_call,
    subclass_of,
    tree_flatten,
    tree_unflatten,
)

SHAPES = {"size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex"}
SHAPES |= {"__len__", "element_size", "get_device", "is_contiguous", "stride", "is_signed"}
SHAPES |= {"shape", "ndim", "dtype", "device", "layout", "itemsize", "nbytes", "names", "is_meta"}
SHAPES |= {"is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested"}
SHAPES |= {"is_mkldnn", "is_sparse_csr", "is_same_size", "is_inference", "is_conj", "is_neg"}
"""What is answered from the shape and the dtype."""
LAZY = {"T", "mT", "H", "mH", "real", "imag", "data"}
"""Attributes that are tensors themselves."""
ASKS = {"__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__repr__"}
ASKS |= {"__format__", "__deepcopy__", "__reduce_ex__", "__array__", "__dlpack__", "item", "tolist"}
ASKS |= {"numpy", "equal", "allclose", "is_nonzero", "data_ptr", "storage", "untyped_storage"}
ASKS |= {"backward", "retain_grad", "register_hook", "nonzero", "unique", "masked_select"}
ASKS |= {"storage_offset", "share_memory_", "pin_memory", "is_pinned", "_typed_storage", "unique"}
ASKS |= {"unique_consecutive", "argwhere", "bincount", "__array_wrap__", "is_set_to", "is_shared"}
"""What gives numbers, or tensors whose shape depends on numbers."""
SEVERAL = {"chunk", "split", "unbind", "split_with_sizes", "tensor_split", "topk", "sort", "max"}
SEVERAL |= {"min", "median", "mode", "kthvalue", "cummax", "cummin", "std_mean", "var_mean", "qr"}
SEVERAL |= {"svd", "eigh", "eig", "lu", "aminmax", "broadcast_tensors", "meshgrid", "frexp"}
SEVERAL |= {"hsplit", "vsplit", "dsplit", "slogdet", "unsafe_chunk", "unsafe_split", "lstm", "gru"}
SEVERAL |= {"multi_head_attention_forward", "native_layer_norm", "native_batch_norm", "where"}
SEVERAL |= {"max_pool1d", "max_pool2d", "max_pool3d", "lstsq", "nanmedian", "rnn_tanh", "rnn_relu"}
"""Functions that may give more than one tensor: their results are known once their shapes are."""
_NOTHING = torch.empty(0, device="meta")
_PLAIN = {Tensor, nn.Parameter, type(None), bool, int, float, str}
_LEAF = object()
"""Where a tensor stands in the structure of an output."""


class Turn:
    """One residual addition in one call of its owner, under a gate that is not plainly open."""

    __slots__ = ("copies", "gate", "handed", "met", "name", "owner", "recomputed", "sites")

    def __init__(
        self, name: str, sites: Mapping[Site, int], gate: Gate, copies: bool, owner: nn.Module
    ) -> None:
        self.name, self.sites, self.gate, self.copies = name, sites, gate, copies
        self.owner = owner
        self.handed = self.met = 0
        self.recomputed: list[Callable[[], bool]] | None = [] if torch.is_grad_enabled() else None
        """Of the checkpoints that the addition is in: whether they compute again what they call."""


class Tape:
    """The order in which a pass has put things off.

    When one of them works in place, all are computed in this order as soon as one is needed, so
    that views and what was read before the change are as they would have been.
    """

    def __init__(self) -> None:
        self.nodes: list[weakref.ref[Node]] = []
        self.in_place: list[Node] = []

    def run(self) -> None:
        for reference in list(self.nodes):
            node = reference()
            if node is not None:
                node.run()


class Node:
    """A call of a function or module that was put off, or the result that it has given."""

    __slots__ = (
        "__weakref__",
        "args",
        "context",
        "done",
        "fakes",
        "function",
        "kwargs",
        "module",
        "tape",
        "turns",
        "value",
        "versions",
    )

    def __init__(
        self,
        tape: Tape,
        turns: tuple[Turn, ...],
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        module: nn.Module | None = None,
    ) -> None:
        self.tape, self.turns, self.function, self.module = tape, turns, function, module
        self.args, self.kwargs = args, kwargs or {}
        self.done, self.value, self.fakes = False, None, None
        self.context = _context()
        self.versions = [(t, changes_of(t)) for t in _real(args, self.kwargs)]
        tape.nodes.append(weakref.ref(self))

    def result(self) -> Any:
        """What the call gives, computed now if it has not been."""
        if self.tape.in_place:
            self.tape.run()
        return self.run()

    def run(self) -> Any:
        if not self.done:
            for tensor, version in self.versions:
                if changes_of(tensor) != version:
                    raise GateError(
                        f"{_name(self)} in a closed branch is needed outside of it, after a tensor "
                        f"{list(tensor.shape)} that it reads was changed in place: exclude= leaves "
                        "the block as it is"
                    )
            args, kwargs = _values(self.args, self.kwargs)
            with _in(self.context):
                value = self.function(*args, **kwargs)
            self.finish(value)
        return self.value

    def finish(self, value: Any) -> None:
        self.done, self.value = True, value
        self.args, self.kwargs, self.versions = (), {}, []

    def shapes(self) -> tuple[list[Any], Any]:
        """Leaves and structure of the result, with tensors that have a shape and no numbers.

        Raises:
            Exception: of any kind, where they cannot be inferred.
        """
        if self.fakes is None:
            key = (_signature(self.args), _signature(self.kwargs), self.context)
            if self.module is not None:
                known = _SHAPES.setdefault(self.module, {})
                key = (self.module.training, *key)
            else:
                known = _FUNCTIONS.setdefault(self.function, {})
            if key not in known:
                if len(known) > 1000:
                    known.clear()
                known[key] = self._infer()
            self.fakes = known[key]
        if self.fakes is _UNKNOWN:
            raise TypeError("not known without computing it")
        return self.fakes

    def _infer(self) -> Any:
        try:
            args, kwargs = _mapped(_without_numbers, (self.args, self.kwargs))
            function = self.function if self.module is None else _hollow(self.module)
            with (
                no_modes(),
                _FAKE,
                torch.no_grad(),
                _in(self.context[1:], grad=False),
            ):
                return tree_flatten(function(*args, **kwargs))
        except Exception:
            return _UNKNOWN


_UNKNOWN: Any = object()
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_SHAPES: weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]] = weakref.WeakKeyDictionary()
_FUNCTIONS: dict[Any, dict[Any, Any]] = {}


class Placeholder(Tensor):
    """A tensor of a branch: put off, or computed and marked as the branch's."""

    _node: Node
    _leaf: int
    """Which of the tensors in the node's result; -1 where that is a tensor itself."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__ if hasattr(func, "__name__") else ""
        if name == "__get__":
            name = func.__self__.__name__
            if name == "requires_grad":
                return _requires_grad(args[0])
            if name not in LAZY and name not in SHAPES:
                name = "item"
        if name in SHAPES:
            return _shape(func, args, kwargs)
        found = placeholders((args, kwargs) if kwargs else args)
        turns = _turns(found)
        if name in ADDITIONS and turns:
            site = _caller()
            turn = _addition(turns, site)
            if turn is not None and _is_branch(turn, turn.sites[site], args):
                return _add(turn, turn.sites[site], func, name, args, kwargs)
        if name in ASKS or name == "__set__" or not turns:
            return func(*_values(args, {})[0], **_values((), kwargs)[1])
        in_place = name in IN_PLACE or (name[-1:] == "_" and name[-2:] != "__")
        if in_place or kwargs.get("inplace") or kwargs.get("out") is not None:
            return _change(func, turns, found, args, kwargs, _caller())
        if all(p._node.done for p in found):
            args, kwargs = _chosen_values(args, kwargs, turns, _caller)
            with no_graph(turns):
                return marked(found[0]._node.tape, turns, func(*args, **kwargs))
        node = Node(found[0]._node.tape, turns, func, args, kwargs)
        if name in SEVERAL or name == "":
            return put_off(node)
        return _placeholder(node, -1)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return repr(value(self))


def put_off(node: Node, gives_tensor: bool = False) -> Any:
    """The result of a call that is not made: its structure with placeholders for tensors.

    Where even the structure is not known without it, the call is made.

    Args:
        gives_tensor: whether the result is a tensor if nothing else is known.
    """
    try:
        leaves, structure = node.shapes()
    except Exception:
        if gives_tensor:
            return _placeholder(node, -1)
        return marked(node.tape, node.turns, node.result())
    return _structured(node, leaves, structure)


def put_off_as(node: Node, leaves: list[Any], structure: Any) -> Any:
    """As `put_off`, where the structure is known: True in place of tensors."""
    return _structured(node, leaves, structure)


def _structured(node: Node, leaves: list[Any], structure: Any) -> Any:
    if len(leaves) == 1 and structure.num_nodes == 1:
        return _placeholder(node, -1)
    made = [
        _placeholder(node, n) if leaf is True or isinstance(leaf, Tensor) else leaf
        for n, leaf in enumerate(leaves)
    ]
    return tree_unflatten(made, structure)


def marked(tape: Tape, turns: tuple[Turn, ...], result: Any) -> Any:
    """`result`, computed, whose tensors are known as the branch's."""
    if isinstance(result, Tensor):
        return _done(tape, turns, result)
    if isinstance(result, tuple | list | dict) or hasattr(result, "__dataclass_fields__"):
        leaves, structure = tree_flatten(result)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            new = [
                _done(tape, turns, leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves
            ]
            return tree_unflatten(new, structure)
    return result


def no_graph(turns: Sequence[Turn]) -> AbstractContextManager[Any]:
    """The context of what is of `turns` alone: without a graph if all of them run forward only."""
    detached = bool(turns) and all(turn.gate.detached for turn in turns)
    return torch.no_grad() if detached else nullcontext()


def value(placeholder: Placeholder) -> Tensor:
    """The tensor itself."""
    result = placeholder._node.result()
    if placeholder._leaf >= 0:
        result = tree_flatten(result)[0][placeholder._leaf]
    if not isinstance(result, Tensor):
        raise GateError(
            f"{_name(placeholder._node)} in a closed branch gave {type(result).__name__} where a "
            "tensor was expected: exclude= leaves the block as it is"
        )
    return result


def resolved(output: Any, everything: bool = True) -> Any:
    """`output` with tensors in place of placeholders.

    Args:
        everything: whether to compute what was put off; else only what is there is put in.
    """
    if isinstance(output, Placeholder):
        return value(output) if everything or output._node.done else output
    if isinstance(output, Tensor) or (
        type(output) is tuple and _PLAIN.issuperset(map(type, output))
    ):
        return output
    leaves, structure = tree_flatten(output)
    if not any(isinstance(leaf, Placeholder) for leaf in leaves):
        return output
    new = [
        value(leaf) if isinstance(leaf, Placeholder) and (everything or leaf._node.done) else leaf
        for leaf in leaves
    ]
    return tree_unflatten(new, structure)


def placeholders(values: Any) -> list[Placeholder]:
    """All placeholders in tuples, lists and mappings."""
    found: list[Placeholder] = []
    _look(values, found)
    return found


def _look(values: Any, found: list[Placeholder]) -> None:
    for each in values.values() if isinstance(values, dict) else values:
        if isinstance(each, Placeholder):
            found.append(each)
        elif isinstance(each, tuple | list | dict):
            _look(each, found)


def _caller() -> Site:
    frame = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return site_of(frame)


def _placeholder(node: Node, leaf: int) -> Placeholder:
    made = subclass_of(Placeholder, _NOTHING)
    made._node, made._leaf = node, leaf
    return made


def _done(tape: Tape, turns: tuple[Turn, ...], tensor: Tensor) -> Placeholder:
    node = Node.__new__(Node)
    node.tape, node.turns, node.function, node.module = tape, turns, torch.Tensor.view_as, None
    node.context, node.fakes = (), None
    node.finish(tensor)
    return _placeholder(node, -1)


def _turns(found: list[Placeholder]) -> tuple[Turn, ...]:
    turns = found[0]._node.turns if found else ()
    for placeholder in found[1:]:
        if placeholder._node.turns is not turns:
            turns = tuple(dict.fromkeys((*turns, *placeholder._node.turns)))
    return turns


def _addition(turns: tuple[Turn, ...], site: Site) -> Turn | None:
    """Whose residual addition stands at `site`."""
    return next((turn for turn in turns if site in turn.sites), None)


def _is_branch(turn: Turn, side: int, args: tuple[Any, ...]) -> bool:
    """Whether what is added is the branch, and what it is added to is not."""
    if len(args) < 2 or not isinstance(args[side], Tensor):
        return False
    shortcut = args[side]
    others = [arg for n, arg in enumerate(args) if n != side]
    own = isinstance(shortcut, Placeholder) and turn in shortcut._node.turns
    return not own and any(turn in p._node.turns for p in placeholders(others))


def _add(
    turn: Turn, side: int, func: Any, name: str, args: tuple, kwargs: Mapping[str, Any]
) -> Any:
    """A residual addition under a gate."""
    turn.met += 1
    if turn.recomputed is not None:
        turn.recomputed += _checkpoints_around(turn)
    shortcut, target = args[side], args[0]
    changes = name in ("add_", "__iadd__", "addcmul_")
    if turn.gate.open:
        shortcut = resolved(shortcut)
        new = [shortcut if n == side else _scaled(turn, arg) for n, arg in enumerate(args)]
        if changes and isinstance(target, Placeholder):
            func = {"addcmul_": torch.addcmul}.get(name, torch.add)
        result = func(*new, **kwargs)
    elif changes and target is shortcut:
        return shortcut
    else:
        copies = turn.copies or changes
        result = shortcut.clone() if copies else shortcut
    if changes and isinstance(target, Placeholder):  # from now on it is this sum
        node = _done(target._node.tape, (), resolved(result))._node
        target._node, target._leaf = node, -1
    return result


def _checkpoints_around(turn: Turn) -> Iterator[Callable[[], bool]]:
    """Those that are at work between the call of the owner and its addition."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "deferring":
            session = frame.f_locals.get("session")
            if session is not None and turn in session.turns.values():
                return
        found = recomputation(frame)
        if found is not None:
            yield found
        frame = frame.f_back


def _scaled(turn: Turn, operand: Any) -> Any:
    if isinstance(operand, Placeholder):
        of_branch = turn in operand._node.turns
        operand = value(operand)
        return turn.gate.scale(operand) if of_branch else operand
    return operand


def _change(
    func: Any,
    turns: tuple[Turn, ...],
    found: list[Placeholder],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    site: Site,
) -> Any:
    """Something works in place, at `site` in the code."""
    target = kwargs.get("out") if kwargs.get("out") is not None else args[0]
    if not isinstance(target, Placeholder) or all(p._node.done for p in found):
        new_args, new_kwargs = _chosen_values(args, kwargs, turns, lambda: site)
        result = func(*new_args, **new_kwargs)
        return target if result is not None else None
    before = _placeholder(target._node, target._leaf)
    args = tuple(before if arg is target else arg for arg in args)
    kwargs = {name: before if arg is target else arg for name, arg in kwargs.items()}
    node = Node(target._node.tape, turns, func, args, kwargs)
    if func.__name__ == "__setitem__":
        node.function = _set_item
    node.fakes = _fakes_of(before)
    node.tape.in_place.append(node)
    target._node, target._leaf = node, -1
    return target


def _set_item(target: Tensor, key: Any, new: Any) -> Tensor:
    target[key] = new
    return target


def _fakes_of(placeholder: Placeholder) -> Any:
    try:
        leaves, structure = tree_flatten(_fake(placeholder))
    except Exception:
        return None
    return leaves, structure


def _shape(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if len(args) == 1 and args[0]._node.done:
        return func(value(args[0]), **kwargs)
    try:
        inferred = _mapped(_without_numbers, args), _mapped(_without_numbers, kwargs)
    except Exception:
        inferred = _values(args, kwargs)
    return func(*inferred[0], **inferred[1])


def _requires_grad(placeholder: Placeholder) -> bool:
    """Whether a gradient would come back, as far as this can be said without computing it."""
    node = placeholder._node
    if node.done:
        return value(placeholder).requires_grad
    if not node.context[0]:
        return False
    if node.module is not None and any(p.requires_grad for p in node.module.parameters()):
        return True
    given = placeholders((node.args, node.kwargs))
    return any(t.requires_grad for t in _real(node.args, node.kwargs)) or any(
        map(_requires_grad, given)
    )


def _values(args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """Arguments with tensors in place of placeholders."""

    def real(leaf: Any) -> Any:
        return value(leaf) if isinstance(leaf, Placeholder) else leaf

    return _mapped(real, args), _mapped(real, kwargs)


def _chosen_values(
    args: Any, kwargs: Mapping[str, Any], turns: tuple[Turn, ...], site: Callable[[], Site]
) -> tuple[Any, Mapping[str, Any]]:
    """As `_values`; under a gate for samples, those samples of what is not of the branch."""
    turn = next((turn for turn in turns if turn.gate.samples is not None), None)
    if turn is not None:
        args, kwargs = chosen(turn.owner, turn.gate, frozenset(turns), (args, kwargs), site())
    return _values(args, kwargs)


def chosen(
    owner: nn.Module, gate: Gate, turns: frozenset[Turn], values: Any, place: Hashable
) -> Any:
    """The drawn samples of what comes into a branch; what is of it already stays as it is."""
    if gate.samples is None:
        return values
    if isinstance(values, Placeholder):
        if not turns.isdisjoint(values._node.turns):
            return values
        return samples(owner, gate, value(values), place)
    kind = type(values)
    if kind is tuple or kind is list:
        parts = [chosen(owner, gate, turns, each, (place, n)) for n, each in enumerate(values)]
        changed = any(new is not old for new, old in zip(parts, values, strict=True))
        return kind(parts) if changed else values
    if kind is dict:
        return {k: chosen(owner, gate, turns, each, (place, k)) for k, each in values.items()}
    return samples(owner, gate, values, place)


def _without_numbers(value: Any) -> Any:
    return _hollow(value) if isinstance(value, nn.Module) else _fake(value)


def _mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """`values` with `function` of each tensor and module in its place."""
    if isinstance(values, Tensor | nn.Module):
        return function(values)
    if isinstance(values, slice):
        parts = values.start, values.stop, values.step
        return slice(*[_mapped(function, each) for each in parts])
    kind = type(values)
    if kind is tuple or kind is list:
        return kind([_mapped(function, each) for each in values])
    if kind is dict:
        return {name: _mapped(function, each) for name, each in values.items()}
    if isinstance(values, tuple) and hasattr(values, "_fields"):
        return kind(*[_mapped(function, each) for each in values])
    return values


def _real(*values: Any) -> Iterator[Tensor]:
    """The tensors that are there, whose changes can be told."""
    for each in values:
        if isinstance(each, Tensor):
            if not isinstance(each, Placeholder) and not each.is_inference():
                yield each
        elif isinstance(each, tuple | list):
            yield from _real(*each)
        elif isinstance(each, dict):
            yield from _real(*each.values())


def _fake(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and kind without numbers."""
    if isinstance(tensor, Placeholder):
        node = tensor._node
        if node.done:
            return _fake(value(tensor))
        leaves, _ = node.shapes()
        fake = leaves[max(0, tensor._leaf)]
        if not isinstance(fake, Tensor):
            raise TypeError("not a tensor")
        return fake
    with no_modes(), _FAKE:
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )


def _signature(values: Any) -> Any:
    """Equal for arguments whose results have the same shapes."""
    if isinstance(values, Placeholder) and not values._node.done:
        values = _fake(values)
    if isinstance(values, Tensor):
        return tuple(values.shape), values.stride(), values.dtype, values.device
    if isinstance(values, tuple | list):
        return type(values), tuple(_signature(each) for each in values)
    if isinstance(values, Mapping):
        return tuple((name, _signature(each)) for name, each in values.items())
    if isinstance(values, slice):
        return _signature((values.start, values.stop, values.step))
    return type(values), values


def _hollow(module: nn.Module) -> nn.Module:
    """A copy of `module` with the same tensors, and without hooks, that may be run for shapes."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for name in vars(module):
        if name.endswith(("_hooks", "_hooks_with_kwargs")):
            twin.__dict__[name] = type(vars(module)[name])()
    set_call(twin, None)
    twin.__dict__["_buffers"] = dict(module._buffers)
    twin.__dict__["_parameters"] = dict(module._parameters)
    twin.__dict__["_modules"] = {
        name: child if child is None else _hollow(child) for name, child in module._modules.items()
    }
    return twin


def _name(node: Node) -> str:
    if node.module is not None:
        return type(node.module).__name__
    return getattr(node.function, "__name__", "a function")


def _context() -> tuple[Any, ...]:
    """Gradients and autocast as they are now."""
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
    )


@contextmanager
def _in(context: tuple[Any, ...], grad: bool = True) -> Iterator[None]:
    """While entered, gradients and autocast are as they were."""
    if grad and context == _context():
        yield
        return
    with ExitStack() as entered:
        if grad:
            entered.enter_context(torch.set_grad_enabled(context[0]))
            context = context[1:]
        for device, enabled, dtype in (("cpu", *context[:2]), ("cuda", *context[2:])):
            if enabled != torch.is_autocast_enabled(device):
                entered.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
        yield


_local = threading.local()


def tape_of_pass() -> Tape | None:
    """That of the outermost call under way which puts things off."""
    return getattr(_local, "tape", None)


def begin_tape(tape: Tape | None) -> None:
    _local.tape = tape
