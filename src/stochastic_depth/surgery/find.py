"""The residual blocks of a model, whoever wrote it."""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.discover import Addition, Site, discover
from stochastic_depth.surgery.slicing import in_loop
from stochastic_depth.surgery.undisturbed import undisturbed

Granularity = Literal["block", "unit"]
"""One coin for all residual additions of a module, or one for each."""

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""The inputs of one forward call: one tensor, positional arguments, or keyword arguments."""

Exclude = Iterable[str | type[nn.Module]]
"""Modules to leave as they are: by name, with all that is inside of them, or by class."""


@dataclass(frozen=True)
class Found:
    """One residual block: a `Residual` unit, or the additions of another module."""

    name: str
    module: nn.Module
    sites: tuple[Site, ...]
    """Of its additions; empty for a `Residual`, whose addition has a gate already."""
    modules: Counter[str]
    """How often each module runs for its branch, by name."""
    parameters: tuple[str, ...]
    """Names, in the model, of the parameters of its branch."""


def caller(model: nn.Module, example: Example) -> Callable[[], Any]:
    """A function that calls `model` on `example`."""
    if isinstance(example, Mapping):
        return lambda: model(**example)
    if isinstance(example, tuple):
        return lambda: model(*example)
    return lambda: model(example)


def find_residuals(model: nn.Module, exclude: Exclude) -> list[Found]:
    """The `Residual` units of `model`, in order of registration."""
    excluded = _excluded(model, exclude)
    return [
        Found(
            name,
            module,
            (),
            Counter(),
            _parameters(f"{name}.branch" if name else "branch", module.branch),
        )
        for name, module in model.named_modules()
        if isinstance(module, Residual) and name not in excluded
    ]


def find_blocks(
    model: nn.Module, example: Example, granularity: Granularity, exclude: Exclude
) -> list[Found]:
    """The residual blocks of `model`, in the order in which they run on `example`.

    Raises:
        UnsupportedBlockError: when a branch is computed in several modules.
    """
    excluded = _excluded(model, exclude)
    modules = dict(model.named_modules())
    with undisturbed(model):
        model.eval()
        additions = discover(model, caller(model, example))
    groups: dict[Any, list[Addition]] = {}
    for addition in additions:
        if addition.owner in excluded:
            continue
        if addition.elsewhere:
            raise unsupported(
                addition.owner,
                modules[addition.owner],
                f"its branch begins outside of the module that adds ({addition.site})",
            )
        if addition.site and not addition.identity and in_loop(addition.site):
            continue  # it gathers parts
        if addition.site is None:
            raise unsupported(
                addition.owner,
                modules[addition.owner],
                "its addition is not in a method of the module, but in a function that one calls",
            )
        key = addition.owner if granularity == "block" else (addition.owner, addition.site)
        groups.setdefault(key, []).append(addition)
    return [_found(modules[group[0].owner], group) for group in groups.values()]


def _found(module: nn.Module, additions: list[Addition]) -> Found:
    name = additions[0].owner
    sites = tuple(a.site for a in additions if a.site is not None)
    parameters = tuple(sorted(frozenset[str]().union(*(a.parameters for a in additions))))
    if isinstance(module, Residual):
        return Found(name, module, (), Counter(), parameters)
    modules = functools.reduce(operator.or_, (Counter(a.modules) for a in additions))
    return Found(name, module, sites, modules, parameters)


def unsupported(name: str, module: nn.Module, why: object) -> UnsupportedBlockError:
    """The error that names a block, its class, the reason and the remedies."""
    return UnsupportedBlockError(
        f"block {name!r} ({type(module).__name__}) cannot be made skippable: {why}; "
        f"exclude=[{name!r}] leaves it as it is, or build it from sd.Residual"
    )


def _excluded(model: nn.Module, exclude: Exclude) -> set[str]:
    excluded: set[str] = set()
    for what in exclude:
        matched = {
            name
            for name, module in model.named_modules()
            if (
                name == what or name.startswith(f"{what}.")
                if isinstance(what, str)
                else isinstance(module, what)
            )
        }
        if not matched:
            raise ApplyError(f"exclude={what!r} matches no module of {type(model).__name__}")
        excluded |= matched
    return excluded


def _parameters(prefix: str, module: nn.Module) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name, _ in module.named_parameters())
