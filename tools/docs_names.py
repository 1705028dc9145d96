"""The reference's public names: those that a package lists in its `__init__.pyi`."""

from typing import Any

import griffe


class ListedNames(griffe.Extension):
    """Makes the names of a stub file the ones that its package exports."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in (pkg, *pkg.modules.values()):
            listed = [n for n, member in module.members.items() if member.is_alias]
            listed = [name for name in listed if not module.members[name].runtime]
            if listed and module.exports is None:
                module.exports = listed
