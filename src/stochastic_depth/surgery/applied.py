"""`sd.remove` and `sd.handle_of`: what `sd.apply` stores on a model, and how to undo it."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from stochastic_depth.errors import ApplyError
from stochastic_depth.handle import Handle
from stochastic_depth.surgery.blocks import FoundBlock, deferred_modules
from stochastic_depth.surgery.droppath import Changed
from stochastic_depth.surgery.install import take_gates
from stochastic_depth.torch_private import set_call

_APPLIED = "_stochastic_depth_applied"
"""The attribute of a model in which its `Applied` is stored."""


@dataclass(frozen=True)
class Applied:
    """The blocks that `sd.apply` has found in a model, and its changes of the model."""

    handle: Handle
    found: Sequence[FoundBlock]
    hooks: tuple[RemovableHandle, ...]
    changed_settings: list[Changed]


def store_applied(model: nn.Module, applied: Applied) -> None:
    """Store `applied` on the model. A copy of the model gets a copy of it."""
    setattr(model, _APPLIED, applied)


def remove(model: nn.Module) -> None:
    """Undo `sd.apply`: restore the original model of constant depth, with the weights it has now.

    Blocks that were compiled by `sd.compile_blocks` are no longer compiled.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`, or on the model that it wraps.

    Examples:
        >>> model = sd.models.CifarResNet(8)
        >>> handle = sd.apply(model)
        >>> sd.remove(model)
        >>> sd.handle_of(model)
        Traceback (most recent call last):
        stochastic_depth.errors.ApplyError: CifarResNet has no stochastic depth: ...
    """
    applied, owner = applied_to(model), owner_of(model)
    for hook in applied.hooks:
        hook.remove()
    for setting in applied.changed_settings:
        setting.restore()
    for block in applied.found:
        for module in (block.module, *deferred_modules(block)):
            set_call(module, None)
    delattr(owner, _APPLIED)
    take_gates(owner)


def handle_of(model: nn.Module) -> Handle:
    """The handle that `sd.apply` returned for `model`, or for the model that `model` is a copy of.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.

    Examples:
        >>> model = sd.models.CifarResNet(8)
        >>> handle = sd.apply(model)
        >>> sd.handle_of(model) is handle
        True
    """
    return applied_to(model).handle


def applied_to(model: nn.Module) -> Applied:
    """What `sd.apply` stored on `model`.

    Raises:
        ApplyError: when `sd.apply` was not called on `model`.
    """
    applied: Applied | None = getattr(model, _APPLIED, None)
    if applied is None:
        raise ApplyError(
            f"{type(model).__name__} has no stochastic depth: call sd.apply(model), or give the "
            "model that it was called on"
        )
    return applied


def owner_of(model: nn.Module) -> nn.Module:
    """The model that `sd.apply` was called on: `model`, or the one whose attributes it forwards.

    Raises:
        ApplyError: when it is neither `model` nor inside it.
    """
    applied = applied_to(model)
    for module in applied_inside(model).values():
        if applied_to(module) is applied:
            return module
    raise ApplyError(
        f"{type(model).__name__} only forwards to a model with stochastic depth: give that model"
    )


def applied_inside(model: nn.Module) -> dict[str, nn.Module]:
    """The models with stochastic depth among `model` and the modules inside it, by name.

    A wrapper that forwards attributes of the model inside it is none of them.
    """
    return {name: each for name, each in model.named_modules() if _APPLIED in vars(each)}
