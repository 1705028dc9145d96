"""Remember a model's modules by name and detect replaced ones."""

import functools
import inspect
import warnings
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import Any

from torch import nn

from stochastic_depth.block import Block


class ModuleSnapshot:
    """The modules that a model has under some names, at the time when this is created.

    Attributes:
        modules: the modules, by name; names that the model does not have are left out.
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
                # Not those that a wrapper forwards from the module it wraps.
                if part in parent._modules:
                    held[id(parent), part] = parent._modules, module
            else:
                self.modules[name] = module
        self._held = [(modules, part, module) for (_, part), (modules, module) in held.items()]

    def is_current(self) -> bool:
        """Whether the model still has the same modules under these names.

        It takes about 0.1 us for each module.
        """
        return all(modules.get(part) is module for modules, part, module in self._held)


class GateReaders:
    """The modules of a model that read gates; warns if one of them no longer does.

    That is so if it was replaced by a different module, or its `forward` by a function that is set
    on the instance. A `forward` that is set on the class has no effect, which is warned of too.

    Args:
        model: the model on which `sd.apply` was called.
        blocks: its blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block]) -> None:
        self._blocks = blocks
        self._snapshot: ModuleSnapshot | None = None
        """None in a copy, until its first forward pass."""
        self._forwards: list[tuple[str, nn.Module, type, Any]] = []
        """The name, module and class of each reader, and the `forward` set on the instance."""
        self._methods: dict[type, list[Any]] = {}
        """For each class of a reader, the forward methods of its base classes."""
        self._take_snapshot(model)

    def warn_of_replaced(self, model: nn.Module) -> None:
        """Warn once if a module or its `forward` was replaced since the last call.

        Wrapping a module or a method does not count as replacing it, nor does moving or removing a
        module.
        """
        snapshot = self._snapshot
        forwards = [
            name
            for name, module, cls, forward in self._forwards
            if vars(module).get("forward") is not forward and type(module) is cls
        ]
        patched = [cls for cls, methods in self._methods.items() if _forwards_of(cls) != methods]
        if snapshot is not None and snapshot.is_current() and not forwards and not patched:
            return
        self._take_snapshot(model)
        if snapshot is None or self._snapshot is None:
            return
        there = set(self._snapshot.modules.values())
        now = ModuleSnapshot(model, snapshot.modules).modules
        replaced = [
            f"{name!r} was replaced after sd.apply, by a {type(now[name]).__name__}; the new "
            "module is never skipped"
            for name, module in snapshot.modules.items()
            if module not in there and name in now and there.isdisjoint(now[name].modules())
        ]
        replaced += [
            f"{name!r}: its forward was replaced on the instance after sd.apply; the new one is "
            "never skipped"
            for name in forwards
            if name in now and now[name] in there and not _still_calls(now[name])
        ]
        for cls in patched if not replaced else ():
            warnings.warn(
                f"{cls.__name__}.forward was replaced after sd.apply, and its blocks still run the "
                "earlier one: sd.remove(model) and sd.apply again, or replace it before sd.apply",
                stacklevel=4,
            )
        if replaced:
            first, *others = replaced
            more = f" ({len(others)} more were replaced)" if others else ""
            warnings.warn(
                f"{first}, although the handle still counts the block{more}: sd.remove(model) and "
                "sd.apply again, or replace it before sd.apply",
                stacklevel=4,
            )

    def _take_snapshot(self, model: nn.Module) -> None:
        """Record which modules read gates now, and which `forward` is set on each instance."""
        readers = {module for block in self._blocks for module in block.gate_readers}
        names = [name for name, each in model.named_modules() if each in readers]
        self._snapshot = ModuleSnapshot(model, names)
        found = self._snapshot.modules.items()
        self._forwards = [(name, m, type(m), vars(m).get("forward")) for name, m in found]
        self._methods = {type(module): _forwards_of(type(module)) for _, module in found}

    def __getstate__(self) -> dict[str, Any]:  # a copy takes a snapshot of its own modules
        return {**self.__dict__, "_snapshot": None, "_forwards": [], "_methods": {}}


def _forwards_of(cls: type) -> list[Any]:
    """The forward methods of the base classes of `cls`; None where a class has none of its own."""
    return [vars(base).get("forward") for base in cls.__mro__[1:]]


def _still_calls(module: nn.Module) -> bool:
    """Whether the `forward` set on the instance refers to the method of its class.

    A wrapper does so, or code that keeps the method in a different attribute of the module.
    """
    todo, seen = list(vars(module).values()), set[int]()
    while todo:
        function = todo.pop()
        if not callable(function) or id(function) in seen:
            continue
        seen.add(id(function))
        method = getattr(function, "__self__", None), getattr(function, "__func__", None)
        if method == (module, type(module).forward):
            return True
        todo += [getattr(function, name, None) for name in ("__wrapped__", "__func__", "func")]
        if isinstance(function, functools.partial):
            todo += [*function.args, *function.keywords.values()]
        if isinstance(function, FunctionType):
            captured = inspect.getclosurevars(function)
            todo += [*captured.nonlocals.values(), *captured.globals.values()]
    return False
