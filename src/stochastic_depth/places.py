"""Where the modules of a model are, and whether others stand in their places by now."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from stochastic_depth.block import Block


class Places:
    """The modules that a model holds under some names when this is created.

    Attributes:
        modules: the modules, by name, without the names under which there is nothing.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.modules: dict[str, nn.Module] = {}
        held: dict[tuple[int, str], tuple[dict[str, Any], nn.Module]] = {}
        for name in names:
            module: Any = model
            for part in name.split(".") if name else ():
                parent, module = module, getattr(module, part, None)
                if not isinstance(module, nn.Module):
                    break
                if part in parent._modules:  # a wrapper may pass on the names of what it wraps
                    held[id(parent), part] = parent._modules, module
            else:
                self.modules[name] = module
        self._held = [(modules, part, module) for (_, part), (modules, module) in held.items()]

    def is_current(self) -> bool:
        """Whether the model still holds the very same modules under these names.

        It costs about 0.1 us for each module.
        """
        return all(modules.get(part) is module for modules, part, module in self._held)


class ReadingModules:
    """The modules of a model that read gates; warns when another one stands in the place of one.

    Args:
        model: the model on which `sd.apply` was called.
        blocks: its blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._places: Places | None = self._places_in(model)
        """None in a copy, until its first forward pass."""

    def warn_of_replaced(self, model: nn.Module) -> None:
        """Warn once if a module was replaced since the last call.

        What holds the module still, such as a wrapper, does not replace it. Modules that were moved
        or taken off are not replaced either.
        """
        if self._places is not None and self._places.is_current():
            return
        before, self._places = self._places, self._places_in(model)
        if before is None:
            return
        there, now = set(self._places.modules.values()), Places(model, before.modules).modules
        replaced = [
            name
            for name, module in before.modules.items()
            if module not in there and name in now and there.isdisjoint(now[name].modules())
        ]
        if replaced:
            first, *others = replaced
            more = f" and {len(others)} more" if others else ""
            warnings.warn(
                f"{first!r}{more}: replaced after sd.apply (by {type(now[first]).__name__}). What "
                "stands there now is never skipped, though the handle counts it: sd.remove(model) "
                "and sd.apply again, or replace modules before sd.apply",
                stacklevel=4,
            )

    def _places_in(self, model: nn.Module) -> Places:
        reading = {module for block in self._blocks for module in block.asking}
        return Places(model, [name for name, each in model.named_modules() if each in reading])

    def __getstate__(self) -> dict[str, Any]:  # a copy looks for its own modules
        return {**self.__dict__, "_places": None}
