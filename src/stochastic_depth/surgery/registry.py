"""Units of an odd form, which say themselves how they are skipped."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from stochastic_depth.errors import ApplyError

GatedForward = TypeVar("GatedForward", bound=Callable[..., Any])

_registered: dict[str, Callable[..., Any]] = {}
"""Gated forward methods, by the module and name of the class."""


def register_unit(kind: type[nn.Module] | str) -> Callable[[GatedForward], GatedForward]:
    """Say how the modules of a class are skipped, where `sd.apply` cannot see it: a decorator.

        @sd.register_unit(Block)
        def forward(block, gate, x, mask):
            if not gate.open:
                return x, mask
            return x + gate.scale(block.attention(x, mask)), mask

    The function is the class's forward method, written with a gate. `sd.apply` holds it against the
    original as it does all others: open, closed, and nothing of the branch run.

    Args:
        kind: the class, or "package.module.Class" of one that is not to be imported for this. The
            classes derived from it that do not have a forward method of their own are meant too.

    Raises:
        ApplyError: when the class has one already.
    """
    name = kind if isinstance(kind, str) else _name(kind)

    def register(forward: GatedForward) -> GatedForward:
        if name in _registered:
            raise ApplyError(
                f"sd.register_unit({name!r}): registered already, by {_registered[name]}"
            )
        _registered[name] = forward
        return forward

    return register


def registered(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The gated forward method of a class, if it has one."""
    for parent in kind.__mro__:
        if _name(parent) in _registered:
            return _registered[_name(parent)]
        if "forward" in vars(parent):
            return None
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
