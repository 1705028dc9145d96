"""Give a module of somebody else's class gates: swap its class for one with sliced methods."""

import functools
import hashlib
import inspect
from collections.abc import Sequence
from types import CellType, FunctionType
from typing import Any

from torch import nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import BlockGates, Gate
from stochastic_depth.surgery.discover import Site
from stochastic_depth.surgery.slicing import slice_method

GATES = "_stochastic_depth_gates"
"""The attribute of a module that holds its `BlockGates`, one for each site."""
_PLAIN = (bool, int, float, str, tuple, type(None))


def install(module: nn.Module, sites: tuple[Site, ...]) -> tuple[BlockGates, ...]:
    """Make the additions at `sites` of `module` skippable, in place.

    The module keeps its parameters, its attributes and, for `isinstance`, its class.

    Returns:
        The gates, one for each site.

    Raises:
        UnsupportedBlockError: when a method cannot be sliced; `module` is as it was.
    """
    copy_shortcut = any(getattr(m, "inplace", False) for m in module.modules())
    kind = gated_class(type(module), sites, copy_shortcut, _look(module))
    module.__dict__[GATES] = gates = tuple(BlockGates() for _ in sites)
    module.__class__ = kind
    return gates


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    module.__class__ = type(module).__mro__[1]
    del module.__dict__[GATES]


def is_installed(module: nn.Module) -> bool:
    return GATES in module.__dict__


@functools.cache
def gated_class(
    kind: type[nn.Module], sites: tuple[Site, ...], copy_shortcut: bool, look: str
) -> Any:
    """A subclass of `kind`, of the same name, whose additions at `sites` have gates.

    torch.compile keeps the graphs of a method with its code object, a few at most, and what it
    knows of changing sizes with the code's name. So each `look` gets both of its own.
    """
    methods: dict[str, Any] = {}
    parents: list[type[nn.Module]] = []
    for defined, name in dict.fromkeys((site.kind, site.method) for site in sites):
        mine = [site for site in sites if (site.kind, site.method) == (defined, name)]
        numbers = [sites.index(site) for site in mine]
        gates = functools.partial(_gates_now, numbers)
        outer = vars(defined)[name]
        inner = inspect.unwrap(outer)
        method = _wrapped_as(outer, inner, slice_method(inner, mine, gates, copy_shortcut))
        if getattr(kind, name) is vars(defined)[name]:
            methods[name] = method
        else:  # reached by super(): a class between `defined` and its children
            parents.append(type(defined.__name__, (defined,), {name: method}))
    if "forward" not in methods and isinstance(kind.forward, FunctionType):
        methods["forward"] = _remade(kind.forward, kind.forward.__closure__)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        build, arguments, *rest = super(made, self).__reduce_ex__(protocol)
        return _build, (build, kind, sites, copy_shortcut, look, *arguments[1:]), *rest

    made: type[nn.Module] = type(
        kind.__name__,
        (kind, *parents),
        {
            **methods,
            "__reduce_ex__": reduce,
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
        },
    )
    forward = vars(made).get("forward")  # transformers wraps it as the class is made
    if isinstance(forward, FunctionType):
        forward.__code__ = forward.__code__.replace(co_name=f"forward_{look}")
    return made


def _wrapped_as(outer: FunctionType, inner: FunctionType, new: FunctionType) -> FunctionType:
    """`new` in the decorators that make `inner` into `outer`.

    Raises:
        UnsupportedBlockError: when a decorator does not keep what it wraps in its closure.
    """
    if outer is inner:
        return new
    wrapped = outer.__wrapped__  # type: ignore[attr-defined]
    cells = list(outer.__closure__ or ())
    held = [i for i, cell in enumerate(cells) if cell.cell_contents is wrapped]
    if not held:
        raise UnsupportedBlockError(f"{outer.__qualname__} has a decorator that cannot be redone")
    replacement = _wrapped_as(wrapped, inner, new)
    for i in held:
        cells[i] = CellType(replacement)
    made = _remade(outer, tuple(cells))
    made.__dict__["__wrapped__"] = replacement
    return made


def _remade(function: FunctionType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """A copy of `function` with another closure."""
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


def _look(module: nn.Module) -> str:
    """Equal for modules that a compiler may give the same graphs, as far as attributes tell."""
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


def _build(
    build: Any,
    kind: type[nn.Module],
    sites: tuple[Site, ...],
    copy_shortcut: bool,
    look: str,
    *rest: Any,
) -> Any:
    """What unpickling and copying call; raises where the source has changed since."""
    try:
        return build(gated_class(kind, sites, copy_shortcut, look), *rest)
    except UnsupportedBlockError as error:
        raise UnsupportedBlockError(
            f"a pickled {kind.__name__} with stochastic depth does not fit its class as it is "
            f"now ({error}): save its state_dict, and apply after loading"
        ) from error
