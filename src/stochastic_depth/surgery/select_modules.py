"""The modules that `include=` and `exclude=` choose: by name, class, or a function of both."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from stochastic_depth.errors import ApplyError

Named = str | type[nn.Module] | Callable[[str, nn.Module], bool]


Choice = Named | Iterable[Named]
"""Modules, with everything inside them: by name, by class, or by a function of name and module."""


@dataclass(frozen=True)
class Chosen:
    """Names of the modules that may be skipped, and of the modules that stay as they are."""

    included: frozenset[str]
    excluded: frozenset[str]

    def has(self, block: str, branch: Iterable[str]) -> bool:
        """Whether a block may be skipped: it is included, and its branch has no excluded module."""
        kept = block in self.excluded or not self.excluded.isdisjoint(branch)
        return block in self.included and not kept


def chosen_modules(model: nn.Module, include: Choice | None, exclude: Choice) -> Chosen:
    """The modules in `include` (all when it is None), and the modules in `exclude`.

    Raises:
        ApplyError: when a choice matches no module; the error names the choice.
    """
    everything = frozenset(name for name, _ in model.named_modules())
    included = everything if include is None else _matching(model, include, "include")
    return Chosen(included, _matching(model, exclude, "exclude"))


def _matching(model: nn.Module, choice: Choice, option: str) -> frozenset[str]:
    matching: set[str] = set()
    for what in [choice] if isinstance(choice, str | type) or callable(choice) else choice:
        roots = [name for name, module in model.named_modules() if _is_meant(what, name, module)]
        if not roots:
            raise ApplyError(
                f"{option}={what!r} matches no module of {type(model).__name__}: sd.plan lists the "
                "blocks, model.named_modules() all names"
            )
        matching |= {
            name
            for name, _ in model.named_modules()
            if any(not root or name == root or name.startswith(f"{root}.") for root in roots)
        }
    return frozenset(matching)


def _is_meant(what: Any, name: str, module: nn.Module) -> bool:
    if isinstance(what, str):
        return name == what
    return isinstance(module, what) if isinstance(what, type) else what(name, module)
