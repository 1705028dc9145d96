"""Packages whose names are imported when they are first used.

`stochastic-depth --help` and an error in a command line do not need PyTorch, which takes seconds to
load. Neither does a program that only reads configurations.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of a package, read from the stub file beside it.

    `__init__.pyi` is the one list of the names of a package, each with the module that defines it.
    Type checkers and editors read it as any other stub, and so does this function. Submodules load
    when they are touched, whether the stub names them or not.

    Args:
        package: the `__name__` of the package.
    """
    module: Any = sys.modules[package]
    stub = ast.parse(Path(module.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    home = {
        name.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module not in (None, package)
        for name in node.names
    }

    class Package(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            # Once imported, a submodule would stand in place of the function that it is named for.
            if isinstance(value, ModuleType) and home.get(name) == f"{package}.{name}":
                value = getattr(value, name)
            super().__setattr__(name, value)

    module.__class__ = Package

    def submodules() -> set[str]:
        return {one.name for one in iter_modules(module.__path__) if not one.name.startswith("_")}

    def find(name: str) -> Any:
        if name in home:
            value = getattr(import_module(home[name]), name)
            setattr(module, name, value)
            return value
        if name in submodules():
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(module), *home, *submodules()})

    return find, names, sorted(home)
