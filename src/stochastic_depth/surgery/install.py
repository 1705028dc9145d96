"""Give a module of somebody else's class gates: swap its class for one with sliced methods."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.gates import BlockGates, Gate
from stochastic_depth.residual import part, scaled
from stochastic_depth.surgery.cuts import Cut, Opaque, Registered, Sliced
from stochastic_depth.surgery.slicing import slice_method

GATES = "_stochastic_depth_gates"
"""The attribute of a module that holds its `BlockGates`, one for each cut."""


def install(module: nn.Module, gates: Mapping[Cut, BlockGates], select: bool = False) -> None:
    """Put `gates` at their cuts of `module`, in place, in order of execution.

    The module keeps its parameters, its attributes and, for `isinstance`, its class.

    Args:
        select: whether a gate may ask for some of the samples only.

    Raises:
        UnsupportedBlockError: when a method cannot be cut; `module` is as it was.
    """
    if "forward" in vars(module):
        raise UnsupportedBlockError("its forward method is set on the instance, not in the class")
    copy_shortcut = any(getattr(m, "inplace", False) for m in module.modules())
    kind = gated_class(type(module), tuple(gates), copy_shortcut, select)
    module.__dict__[GATES] = tuple(gates.values())
    module.__class__ = kind


def uninstall(module: nn.Module) -> None:
    """Undo `install`."""
    module.__class__ = type(module).__mro__[1]
    del module.__dict__[GATES]


def is_installed(module: nn.Module) -> bool:
    return GATES in module.__dict__


@functools.cache
def gated_class(
    kind: type[nn.Module], cuts: tuple[Cut, ...], copy_shortcut: bool, select: bool
) -> Any:
    """A subclass of `kind`, of the same name, which has gates at `cuts`.

    Raises:
        UnsupportedBlockError: when a method cannot be cut.
    """
    methods: dict[str, Any] = {}
    parents: list[type[nn.Module]] = []
    sliced = [cut for cut in cuts if isinstance(cut, Sliced)]
    for defined, name in dict.fromkeys((cut.place.kind, cut.place.method) for cut in sliced):
        mine = [cut for cut in sliced if (cut.place.kind, cut.place.method) == (defined, name)]
        gates = functools.partial(_gates_now, [cuts.index(cut) for cut in mine])
        outer = vars(defined)[name]
        inner = inspect.unwrap(outer)
        new = slice_method(inner, mine, gates, copy_shortcut, select)
        method = _wrapped_as(outer, inner, new)
        if getattr(kind, name) is vars(defined)[name]:
            methods[name] = method
        else:  # reached by super(): a class between `defined` and its children
            parents.append(type(defined.__name__, (defined,), {name: method}))

    for number, cut in enumerate(cuts):
        if isinstance(cut, Opaque):
            methods["forward"] = functools.partialmethod(_opaque_forward, number)
        elif isinstance(cut, Registered):
            methods["forward"] = functools.partialmethod(_registered_forward, number, cut.forward)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        build, arguments, *rest = super(made, self).__reduce_ex__(protocol)
        return _build, (build, kind, cuts, copy_shortcut, select, *arguments[1:]), *rest

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
    made = FunctionType(
        outer.__code__, outer.__globals__, outer.__name__, outer.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = outer.__kwdefaults__
    made.__dict__.update(outer.__dict__, __wrapped__=replacement)
    return made


def _gates_now(numbers: Sequence[int], module: nn.Module) -> list[Gate]:
    gates: tuple[BlockGates, ...] = module.__dict__[GATES]
    return [gates[number].now(module.training) for number in numbers]


def _opaque_forward(module: Any, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The original forward under a gate, of a module that returns its input plus a branch."""
    gate: Gate = module.__dict__[GATES][number].now(module.training)
    if not gate.open:
        return x
    original = super(type(module), module).forward  # pyright: ignore[reportAttributeAccessIssue]
    if gate.factor == 1.0 and gate.batch is None:
        return original(x, *args, **kwargs)
    some = part(x, gate)
    return x + scaled(original(some, *part(args, gate), **part(kwargs, gate)) - some, gate)


def _registered_forward(
    module: Any, number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    gate: Gate = module.__dict__[GATES][number].now(module.training)
    return forward(module, gate, *args, **kwargs)


def _build(
    build: Any,
    kind: type[nn.Module],
    cuts: tuple[Cut, ...],
    copy_shortcut: bool,
    select: bool,
    *rest: Any,
) -> Any:
    """What unpickling and copying call; raises where the source has changed since."""
    try:
        return build(gated_class(kind, cuts, copy_shortcut, select), *rest)
    except UnsupportedBlockError as error:
        raise UnsupportedBlockError(
            f"a pickled {kind.__name__} with stochastic depth does not fit its class as it is "
            f"now ({error}): save its state_dict, and apply after loading"
        ) from error
