"""Take blocks out of a plain model."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import TruncateError
from stochastic_depth.residual import Residual


class Shortcut(nn.Module):
    """What is left of a residual unit without its branch: act(shortcut(x))."""

    def __init__(self, unit: Residual) -> None:
        super().__init__()
        self.shortcut = unit.shortcut
        self.activation = unit.activation
        self._overwrites = unit._overwrites

    def forward(self, x: Tensor) -> Tensor:
        if self._overwrites:
            x = x.clone()  # the activation works in place, and x is not this block's to change
        out = x if self.shortcut is None else self.shortcut(x)
        return out if self.activation is None else self.activation(out)


def take_out(model: nn.Module, names: Collection[str]) -> None:
    """Make the named `Residual` units their shortcuts, and remove other blocks, in place.

    Raises:
        TruncateError: when a block is no element of another module.
    """
    lists: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        unit = model.get_submodule(name)
        if not name:
            raise TruncateError(f"{type(model).__name__} is one block as a whole: nothing remains")
        if isinstance(unit, Residual):
            setattr(model.get_submodule(parent), child, Shortcut(unit))
        else:
            lists.setdefault(parent, []).append(child)
    for parent, children in lists.items():
        _remove(model, model.get_submodule(parent), children)


def _remove(model: nn.Module, parent: Any, children: Collection[str]) -> None:
    """Remove the children of `parent`, and count those that are left anew."""
    before = list(parent._modules)
    numbered = before == [str(number) for number in range(len(before))]
    kept = [name for name in before if name not in children]
    modules = [parent._modules[name] for name in kept]
    parent._modules.clear()
    for number, (name, module) in enumerate(zip(kept, modules, strict=True)):
        parent._modules[str(number) if numbered else name] = module
    if numbered:
        _tell_transformers(model, len(before), [int(name) for name in kept], modules)


def _tell_transformers(
    model: Any, before: int, kept: list[int], modules: Iterable[nn.Module]
) -> None:
    """Where layers know their number and the configuration counts them, keep both right."""
    for new, (old, layer) in enumerate(zip(kept, modules, strict=True)):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]
    config: Any = getattr(model, "config", None)
    if getattr(config, "num_hidden_layers", None) == before and not config.is_encoder_decoder:
        types = getattr(config, "layer_types", None)
        if types is not None and len(types) == before:
            config.layer_types = [types[number] for number in kept]
        config.num_hidden_layers = len(kept)
