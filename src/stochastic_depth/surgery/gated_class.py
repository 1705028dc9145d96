"""Subclasses of the classes of modules, with gates at their residual additions."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import CellType, FunctionType
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import BlockGates, Gate
from stochastic_depth.surgery.deferred.forward import deferring_forward
from stochastic_depth.surgery.edits import (
    DeferredEdit,
    Edit,
    EntryEdit,
    RegisteredEdit,
    RewriteEdit,
)
from stochastic_depth.surgery.rewrite.methods import slice_method

GATES = "_stochastic_depth_gates"
"""The attribute of a module that holds its `BlockGates`, one for each edit of the module."""
_ORIGINAL = "_stochastic_depth_original"
"""The attribute of a class with gates that holds the class it was derived from."""
OWN_FORWARD = "_stochastic_depth_forward"
"""The attribute of a module with gates that holds the `forward` that was set on the instance."""
_PLAIN = (bool, int, float, str, tuple, type(None))


@functools.cache
def gated_class(
    cls: type[nn.Module],
    edits: tuple[Edit, ...],
    select: bool,
    alike: str,
    own_forward: bool = False,
) -> Any:
    """A subclass of `cls`, of the same name, with gates at `edits`.

    torch.compile keeps a limited number of graphs for each code object of a method, and remembers
    changing sizes by the name of the code. So modules with a different `alike` get different code
    objects and names.

    Args:
        alike: a text that is equal for modules that may share compiled graphs.
        own_forward: whether the module has a `forward` that was set on the instance.

    Raises:
        UnsupportedBlockError: when a method cannot be edited.
    """
    methods, parents = _gated_methods(cls, edits, select, own_forward)
    if "forward" not in methods and isinstance(cls.forward, FunctionType):
        is_of_torch = cls.forward.__module__.partition(".")[0] == "torch"
        methods["forward"] = (
            _called(cls.forward) if is_of_torch else _remade(cls.forward, cls.forward.__closure__)
        )

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        build, arguments, *rest = super(made, self).__reduce_ex__(protocol)
        return _build, (build, cls, edits, select, alike, own_forward, *arguments[1:]), *rest

    @functools.wraps(cls.__init__)
    def initialise(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if type(self) is made:  # a newly constructed module has no gates
            self.__class__ = cls
        cls.__init__(self, *args, **kwargs)

    made: type[nn.Module] = type(
        cls.__name__,
        (cls, *parents),
        {
            **methods,
            "__init__": initialise,
            "__reduce_ex__": reduce,
            _ORIGINAL: cls,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        },
    )
    forward = vars(made).get("forward")  # transformers wraps it as the class is made
    deferring = any(isinstance(edit, DeferredEdit | EntryEdit) for edit in edits)
    if isinstance(forward, FunctionType) and not deferring:
        forward.__code__ = forward.__code__.replace(co_name=f"forward_{alike}")
    return made


def ungated_class(cls: type) -> Any:
    """`cls` without gates: the original class takes the place of the class with gates.

    `fully_shard` and parametrizations derive further classes from it; these stay.
    """
    if _ORIGINAL in vars(cls):
        return vars(cls)[_ORIGINAL]
    bases = tuple(map(ungated_class, cls.__bases__))
    if bases == cls.__bases__:
        return cls
    members = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, members)


def _gated_methods(
    cls: type[nn.Module], edits: tuple[Edit, ...], select: bool, own_forward: bool
) -> tuple[dict[str, Any], list[type[nn.Module]]]:
    """The methods of `cls` with gates at `edits`, by name.

    Returns:
        The methods; and classes with such a method, to be put between a base class and the classes
        that are derived from it.

    Raises:
        UnsupportedBlockError: when a method cannot be edited.
    """
    methods: dict[str, Any] = {}
    parents: list[type[nn.Module]] = []
    sliced = [edit for edit in edits if isinstance(edit, RewriteEdit)]
    for defined, name in dict.fromkeys(
        (edit.location.cls, edit.location.method) for edit in sliced
    ):
        mine = [
            edit for edit in sliced if (edit.location.cls, edit.location.method) == (defined, name)
        ]
        gates = functools.partial(_gates_now, [edits.index(edit) for edit in mine])
        outer = vars(defined)[name]
        inner = inspect.unwrap(outer)
        new = slice_method(inner, mine, gates, select)
        method = _wrapped_as(outer, inner, new)
        if getattr(cls, name) is vars(defined)[name]:
            methods[name] = method
        else:  # reached by super(): derive a class from `defined`, to come before it in the MRO
            parents.append(type(defined.__name__, (defined,), {name: method}))
    for number, edit in enumerate(edits):
        if isinstance(edit, RegisteredEdit):
            methods["forward"] = _registered_forward(edit.forward, number)
    if any(isinstance(edit, DeferredEdit | EntryEdit) for edit in edits):
        inner = _own_forward if own_forward else methods.get("forward") or cls.forward
        deferred = [(n, edit) for n, edit in enumerate(edits) if isinstance(edit, DeferredEdit)]
        is_entry = any(isinstance(edit, EntryEdit) for edit in edits)
        methods["forward"] = deferring_forward(inner, deferred, GATES, is_entry)
        for name, method in _adding_methods(cls, [edit for _, edit in deferred]):
            methods[name] = deferring_forward(method, deferred, GATES, True, is_helper=True)
    return methods, parents


def _adding_methods(
    cls: type[nn.Module], edits: Sequence[DeferredEdit]
) -> Iterator[tuple[str, FunctionType]]:
    """The methods of `cls`, beside `forward`, that make one of these additions.

    They may be called without the forward method, as `forward_features` is.
    """
    sites = {site[:3] for edit in edits for site, _ in edit.sites}
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if name != "forward" and isinstance(method, FunctionType):
            code = inspect.unwrap(method).__code__
            if (code.co_filename, code.co_qualname, code.co_firstlineno) in sites:
                yield name, method


def _wrapped_as(outer: FunctionType, inner: FunctionType, new: FunctionType) -> FunctionType:
    """`new`, under the decorators that turn `inner` into `outer`.

    Raises:
        UnsupportedBlockError: when a decorator does not keep what it wraps in its closure.
    """
    if outer is inner:
        return new
    wrapped = outer.__wrapped__  # type: ignore[attr-defined]
    cells = list(outer.__closure__ or ())
    wrapping = [i for i, cell in enumerate(cells) if cell.cell_contents is wrapped]
    if not wrapping:
        raise UnsupportedBlockError(
            f"{outer.__qualname__} has a decorator that cannot be applied again"
        )
    replacement = _wrapped_as(wrapped, inner, new)
    for i in wrapping:
        cells[i] = CellType(replacement)
    made = _remade(outer, tuple(cells))
    made.__dict__["__wrapped__"] = replacement
    return made


def _remade(function: FunctionType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """A copy of `function` with a different closure."""
    made = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        closure,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__, made.__doc__ = function.__qualname__, function.__doc__
    made.__annotations__ = function.__annotations__
    made.__dict__.update(function.__dict__)
    return made


def _called(function: FunctionType) -> FunctionType:
    """A function defined in this file that calls `function` of PyTorch.

    The compiler begins no graph in a function that is defined in PyTorch's own files.
    """

    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return forward  # type: ignore[return-value]


def fingerprint(module: nn.Module) -> str:
    """A digest of the attributes of `module`, and of the shapes of all tensors in it."""
    parts = [
        (
            name,
            type(part).__qualname__,
            [(k, v) for k, v in vars(part).items() if k != "training" and isinstance(v, _PLAIN)],
            [(k, v.shape, v.dtype) for k, v in part.named_parameters(recurse=False)],
            [(k, v.shape, v.dtype) for k, v in part.named_buffers(recurse=False)],
        )
        for name, part in module.named_modules()
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:8]


def _gates_now(numbers: Sequence[int], module: nn.Module) -> list[Gate]:
    gates: tuple[BlockGates, ...] = module.__dict__[GATES]
    return [gates[number].now(module.training) for number in numbers]


def _registered_forward(gated: Callable[..., Any], number: int) -> FunctionType:
    """The forward method for `gated`, a registered function of (module, gate, *args)."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        gate: Gate = self.__dict__[GATES][number].now(self.training)
        return gated(self, gate, *args, **kwargs)

    return forward  # type: ignore[return-value]


def _own_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `forward` that was set on the instance."""
    return self.__dict__[OWN_FORWARD](*args, **kwargs)


def _build(
    build: Any,
    cls: type[nn.Module],
    edits: tuple[Edit, ...],
    select: bool,
    alike: str,
    own_forward: bool,
    *rest: Any,
) -> Any:
    """Rebuild a module when it is unpickled or copied.

    Raises:
        UnsupportedBlockError: when the source of its class has changed since.
    """
    try:
        return build(gated_class(cls, edits, select, alike, own_forward), *rest)
    except UnsupportedBlockError as error:
        raise UnsupportedBlockError(
            f"a pickled {cls.__name__} with stochastic depth does not fit the present source of "
            f"its class ({error}): save its state_dict instead, and call sd.apply after loading"
        ) from error
