"""Remove blocks from a plain network."""

from collections.abc import Collection, Iterable
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import TruncateError
from stochastic_depth.export.configurations import update_configurations
from stochastic_depth.residual import Residual, works_in_place


class ShortcutOnly(nn.Module):
    """A residual unit without its branch: act(shortcut(x))."""

    def __init__(self, unit: Residual) -> None:
        super().__init__()
        self.shortcut = unit.shortcut
        self.activation = unit.activation

    def forward(self, x: Tensor) -> Tensor:
        if works_in_place(self.activation):
            x = x.clone()  # the activation works in place, and x belongs to the caller
        out = x if self.shortcut is None else self.shortcut(x)
        return out if self.activation is None else self.activation(out)


def replace_by_shortcuts(model: nn.Module, names: Collection[str]) -> None:
    """Replace the named `Residual` units by their shortcuts, and remove other blocks, in place.

    Raises:
        TruncateError: when a block is the model itself.
    """
    lists: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        unit = model.get_submodule(name)
        if not name:
            raise TruncateError(
                f"{type(model).__name__} is itself a block: nothing would be left without it"
            )
        if isinstance(unit, Residual):
            setattr(model.get_submodule(parent), child, ShortcutOnly(unit))
        else:
            lists.setdefault(parent, []).append(child)
    for parent in sorted(lists, key=lambda name: name.count("."), reverse=True):
        _remove(model, parent, lists[parent])  # inner lists first: removing changes names


def blocks_of(model: nn.Module) -> list[str]:
    """The names of the residual blocks that are left in `model`, in order."""
    return [name for name, module in model.named_modules() if isinstance(module, Residual)]


def remove_blocks(model: nn.Module, positions: Iterable[int]) -> None:
    """Replace the blocks of a plain network at `positions` by their shortcuts, in place."""
    names = blocks_of(model)
    replace_by_shortcuts(model, [names[position] for position in positions])


def _remove(model: nn.Module, name: str, children: Collection[str]) -> None:
    """Remove children of the module called `name`; in a list, the remaining ones move up."""
    parent: Any = model.get_submodule(name)
    before = list(parent._modules)
    numbered = before == [str(number) for number in range(len(before))]
    kept = [number for number in before if number not in children]
    modules = [parent._modules[number] for number in kept]
    parent._modules.clear()
    for number, (old, module) in enumerate(zip(kept, modules, strict=True)):
        parent._modules[str(number) if numbered else old] = module
    if numbered:
        _renumber(modules, [int(number) for number in kept])
        update_configurations(model, name, len(before), [int(number) for number in kept])


def _renumber(modules: Iterable[nn.Module], kept: list[int]) -> None:
    """Update the positions that layers store."""
    for new, (old, layer) in enumerate(zip(kept, modules, strict=True)):
        for module in layer.modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]
