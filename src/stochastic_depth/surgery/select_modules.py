"""The modules that `include=` and `exclude=` select: by name, class or function, or themselves."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from stochastic_depth.errors import ApplyError

_Selector = str | type[nn.Module] | nn.Module | Callable[[str, nn.Module], bool]


ModuleSelector = _Selector | Iterable[_Selector]
"""Selects modules, and everything inside them: by name, by class, by a function of name and module,
or the modules themselves."""


@dataclass(frozen=True)
class SelectedModules:
    """Names of the modules that may be skipped, and of those that must not be changed."""

    included: frozenset[str]
    excluded: frozenset[str]

    def allows(self, block: str, branch: Iterable[str]) -> bool:
        """Whether a block may be skipped: it is included, and its branch has no excluded module."""
        excluded = block in self.excluded or not self.excluded.isdisjoint(branch)
        return block in self.included and not excluded


def select_modules(
    model: nn.Module, include: ModuleSelector | None, exclude: ModuleSelector | None
) -> SelectedModules:
    """The modules that `include` selects (all if it is None), and those that `exclude` selects.

    Raises:
        ApplyError: when a selector matches no module; the error names the selector.
    """
    everything = frozenset(name for name, _ in model.named_modules())
    included = everything if include is None else _matching(model, include, "include")
    excluded = frozenset() if exclude is None else _matching(model, exclude, "exclude")
    return SelectedModules(included, excluded)


def _matching(model: nn.Module, selectors: ModuleSelector, option: str) -> frozenset[str]:
    matching: set[str] = set()
    for selector in _listed(selectors):
        roots = [name for name, module in model.named_modules() if _matches(selector, name, module)]
        if not roots:
            of_module = isinstance(selector, nn.Module)  # its representation may be long
            shown = type(selector).__name__ if of_module else repr(selector)
            raise ApplyError(
                f"{option}={shown} matches no module of {type(model).__name__}: sd.plan lists "
                "the blocks, model.named_modules() all names"
            )
        matching |= {
            name
            for name, _ in model.named_modules()
            if any(not root or name == root or name.startswith(f"{root}.") for root in roots)
        }
    if option == "include" and not matching:
        raise ApplyError("include names no module at all: leave it out to look in every module")
    return frozenset(matching)


def _listed(selectors: ModuleSelector) -> Iterable[_Selector]:
    if isinstance(selectors, str | type) or callable(selectors):
        return [selectors]  # type: ignore[list-item]
    return selectors


def _matches(selector: _Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, nn.Module):
        return module is selector
    if isinstance(selector, str):
        return name == selector
    return isinstance(module, selector) if isinstance(selector, type) else selector(name, module)
