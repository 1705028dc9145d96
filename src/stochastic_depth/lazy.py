"""Packages whose names are imported when they are first used.

`stochastic-depth --help` and an error in a command line need no PyTorch, which takes seconds to
load; nor does a program that only reads configurations.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def lazily(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package whose names live in submodules.

    Args:
        package: its `__name__`.
        homes: the names that each submodule gives, by the submodule's name within the package.

    Returns:
        Functions that find those names, and the submodules themselves.
    """
    home = {name: module for module, names in homes.items() for name in names}

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # Once imported, a submodule would stand in place of the function that it is named for.
            if isinstance(value, ModuleType) and home.get(name) == name:
                value = getattr(value, name)
            super().__setattr__(name, value)

    sys.modules[package].__class__ = Package

    def submodules() -> set[str]:
        path = sys.modules[package].__path__
        return {module.name for module in iter_modules(path) if not module.name.startswith("_")}

    def find(name: str) -> Any:
        if name in home:
            value = getattr(import_module(f"{package}.{home[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in submodules():
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home, *submodules()})

    return find, names
