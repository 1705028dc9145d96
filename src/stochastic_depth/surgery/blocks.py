"""The record of a residual block that was found, and the errors that name a block."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.places import Places
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.branches import Event
from stochastic_depth.surgery.edits import Argument, Deferred, Edit, Registered, Sum
from stochastic_depth.surgery.example import Example

Granularity = Literal["block", "unit"]
"""One coin for all residual additions of a block, or one for each addition."""


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """The part of a block under one gate: a residual addition, or a registered module."""

    edits: tuple[tuple[nn.Module, Edit], ...]
    """The modules that get the gate, each with the edit that puts the gate into its code."""
    additions: tuple[tuple[nn.Module, Sum], ...]
    """The modules whose code adds, each with the place of the addition."""
    events: tuple[Event, ...] = ()
    """The additions that a deferred unit made in the recorded forward pass."""
    modules: frozenset[str] = frozenset()
    """Names of the modules that run for its branch."""


@dataclass(frozen=True)
class Found:
    """A residual block: a `Residual` unit, or additions in other modules that share a coin."""

    name: str
    module: nn.Module
    shortcut: str
    """"identity" or "projection"; "identity, projection" where its additions differ."""
    units: tuple[Unit, ...]
    """Empty for a `Residual`, whose addition has a place for a gate already."""
    modules: Counter[str]
    """How often each module runs for its branches in one forward pass, by name."""
    parameters: tuple[str, ...]
    """Names of the parameters of its branches, in the model."""
    flops: int
    """FLOPs of its branches in one forward pass on the example; 0 where they were not counted."""
    refusal: str = ""
    """The reason why it cannot be made skippable; empty if it can."""
    training_only: bool = False
    """Whether the model runs it in training mode only."""
    change: str = ""
    """How its branch changes its shortcut in place; empty if it does not."""

    def without_recording(self) -> "Found":
        """This block without the tensors of the recorded pass, to be kept as long as the model."""
        units = [
            replace(unit, events=tuple(event.without_recording() for event in unit.events))
            for unit in self.units
        ]
        return replace(self, units=tuple(units))

    @property
    def mechanism(self) -> str:
        """The name of the mechanism that makes it skippable; "none" if it was refused."""
        if self.refusal:
            return "none"
        kinds = {type(edit) for unit in self.units for _, edit in unit.edits}
        return next((name for kind, name in MECHANISM_OF.items() if kind in kinds), "Residual")


MECHANISM_OF = {
    Registered: "registered",
    Deferred: "deferred",
    Argument: "call",
    Sum: "slice",
}
"""The mechanism of a block is the first of these that one of its units needs."""


def deferred_modules(found: Found) -> list[nn.Module]:
    """The outermost modules of the branches of a deferred block; empty for any other block."""
    return [
        module
        for unit in found.units
        for owner, edit in unit.edits
        if isinstance(edit, Deferred)
        for module in Places(owner, [calls.module for calls in edit.calls]).modules.values()
    ]


def repeated_block(owner: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of the block that a residual module belongs to.

    The block is the first module, from `owner` outwards, that is an element of a list of modules of
    one class; or `owner` itself where there is none.
    """
    name = owner
    while name:
        if is_repeated(name, modules):
            return name
        name = name.rpartition(".")[0]
    return owner


def is_repeated(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module of this name is an element of a list of modules of one class."""
    container = modules[name.rpartition(".")[0]]
    siblings = list(container.children())
    alike = sum(type(sibling) is type(modules[name]) for sibling in siblings)
    return bool(name) and isinstance(container, CONTAINERS) and (alike > 1 or len(siblings) == 1)


def nothing_found(
    model: nn.Module, example: Example | None, rejected: Sequence[str] = ()
) -> ApplyError:
    """The error for a model in which no block can be skipped.

    Args:
        rejected: the additions that were seen and rejected, each with the reason.
    """
    found = f"no residual block found in {type(model).__name__}, so nothing can be skipped"
    if example is None:
        return ApplyError(
            f"{found}: give example=, the inputs of one forward call, to find those of any model"
        )
    return ApplyError(
        f"{found}: a block must add what it computes to its input, or to a projection of it; "
        "concatenation (DenseNet), gating and subtraction are not residual"
        + "".join(f"; not taken: {each}" for each in rejected[:3])
    )


def unsupported(
    name: str, module: nn.Module, why: object, others: Sequence[str] = ()
) -> UnsupportedBlockError:
    """The error for a block, with its class and the reason, which holds for `others` too."""
    error = UnsupportedBlockError(
        f"block {name!r} ({type(module).__name__}) cannot be made skippable: {why}"
    )
    error.blocks = (name, *others)
    return error


def with_remedy(
    error: UnsupportedBlockError, left_out: Iterable[str], kept: Iterable[str]
) -> UnsupportedBlockError:
    """`error` with a sentence that says what to leave out.

    Args:
        left_out: names of the blocks without which stochastic depth can be applied.
        kept: names of all other blocks.
    """
    out, rest = list(dict.fromkeys(left_out)), list(dict.fromkeys(kept))
    if rest and any(is_inside(name, of) for name in rest for of in out):
        remedy = f"include={_around(rest, out)!r} leaves what cannot be skipped as it is"
    elif rest:
        what = "it as it is" if len(out) == 1 else "them as they are"
        remedy = f"exclude={out!r} leaves {what}"
    else:
        remedy = "no other block of the model can be skipped"
    advised = UnsupportedBlockError(
        f"{error}; {remedy}; sd.register_unit says how one is skipped, or build it from sd.Residual"
    )
    advised.blocks = error.blocks
    return advised


def is_inside(name: str, of: str) -> bool:
    """Whether the module `name` is inside the module `of`, judged by their names."""
    return name != of and (not of or name.startswith(f"{of}."))


def _around(names: Sequence[str], apart: Sequence[str]) -> list[str]:
    """The outermost modules that hold some of `names` and none of `apart`."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        found[next(p for p in paths if not any(a == p or is_inside(a, p) for a in apart))] = None
    return list(found)


def branch_modules(name: str, module: Residual) -> list[str]:
    """Names of the modules in the branch of a `Residual` unit."""
    branch = f"{name}.branch" if name else "branch"
    return [inner for inner, _ in module.branch.named_modules(prefix=branch)]


def residual_block(name: str, module: Residual, flops: int) -> Found:
    branch = f"{name}.branch" if name else "branch"
    parameters = tuple(f"{branch}.{inner}" for inner, _ in module.branch.named_parameters())
    shortcut = "identity" if module.shortcut is None else "projection"
    return Found(name, module, shortcut, (), Counter(), parameters, flops)
