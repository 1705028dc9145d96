"""Residual blocks that were found in a model, and the errors that name a block."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.module_snapshot import ModuleSnapshot
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.adapters import full_name
from stochastic_depth.surgery.edits import (
    AdditionEdit,
    ArgumentEdit,
    DeferredEdit,
    Edit,
    RegisteredEdit,
)
from stochastic_depth.surgery.example import Example
from stochastic_depth.surgery.record.branches import Occurrence

Mechanism = Literal["Residual", "registered", "slice", "call", "deferred", "none"]
"""How a block is made skippable; `PlannedBlock.mechanism` explains the names."""

MODULE_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """The part of a block under one gate: a residual addition, or a registered module."""

    edits: tuple[tuple[nn.Module, Edit], ...]
    """The modules that get the gate, each with the edit that puts the gate into its code."""
    additions: tuple[tuple[nn.Module, AdditionEdit], ...]
    """The modules whose code adds, each with the edit of the addition."""
    occurrences: tuple[Occurrence, ...] = ()
    """The additions that a deferred unit made in the recorded forward passes."""
    modules: frozenset[str] = frozenset()
    """Names of the modules that its branch calls."""


@dataclass(frozen=True, kw_only=True)
class FoundBlock:
    """A residual block before it has gates: a `Residual` unit, or additions in other modules.

    It becomes a `Block` when gates are installed.
    """

    name: str
    module: nn.Module
    shortcut: str
    """"identity" or "projection"; "identity, projection" where its additions differ."""
    units: tuple[Unit, ...]
    """Empty for a `Residual`, which is written with a gate."""
    modules: Counter[str]
    """How often its branches call each module in one pass, by name. Empty for a `Residual`."""
    parameters: tuple[str, ...]
    """Names of the parameters of its branches, in the model."""
    flops: int
    """FLOPs of its branches in one forward pass on the example; 0 if they were not counted."""
    refusal: str = ""
    """The reason why it cannot be made skippable; empty if it can."""
    training_only: bool = False
    """Whether the model runs it in training mode only."""
    in_place_problem: str = ""
    """How its branch changes its shortcut in place; empty if it does not."""

    def names_in_branch(self) -> Collection[str]:
        """Names of the modules in its branches."""
        if isinstance(self.module, Residual):
            return [name for name, _ in self.module.branch.named_modules(prefix=_branch(self.name))]
        return self.modules

    @property
    def is_rewritten(self) -> bool:
        """Whether methods are rewritten, so that the block may be deferred instead."""
        return self.mechanism in ("slice", "call")

    @property
    def is_deferred(self) -> bool:
        return self.mechanism == "deferred"

    @property
    def is_registered(self) -> bool:
        return self.mechanism == "registered"

    @property
    def mechanism(self) -> Mechanism:
        """The name of the mechanism that makes it skippable; "none" if it was refused."""
        if self.refusal:
            return "none"
        classes = {type(edit) for unit in self.units for _, edit in unit.edits}
        for cls, name in MECHANISM_OF.items():
            if cls in classes:
                return name
        return "Residual"


def enclosing(found: Sequence[FoundBlock]) -> list[tuple[int, ...]]:
    """For each block, the positions of the blocks that have it in their branch.

    Such a block is named after a module inside theirs, and runs only while all of them are open.
    """
    branches = [(each.name, set(each.names_in_branch())) for each in found]
    return [
        tuple(
            number
            for number, (outer, branch) in enumerate(branches)
            if is_inside(name, outer) and inner <= branch
        )
        for name, inner in branches
    ]


MECHANISM_OF: dict[type[Edit], Mechanism] = {
    RegisteredEdit: "registered",
    DeferredEdit: "deferred",
    ArgumentEdit: "call",
    AdditionEdit: "slice",
}
"""The mechanism of a block is the first of these that one of its units needs."""


def deferred_modules(found: FoundBlock) -> list[nn.Module]:
    """The outermost modules of the branches of a deferred block; empty if it is not deferred."""
    return [
        module
        for unit in found.units
        for owner, edit in unit.edits
        if isinstance(edit, DeferredEdit)
        for module in ModuleSnapshot(owner, [calls.module for calls in edit.calls]).modules.values()
    ]


def repeated_block(owner: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of the block that a residual module belongs to.

    The block is the first module, from `owner` outwards, that is an element of a list of modules of
    one class; or `owner` itself if there is none.
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
    return (
        bool(name)
        and isinstance(container, MODULE_CONTAINERS)
        and (alike > 1 or len(siblings) == 1)
    )


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
    name: str,
    module: nn.Module,
    why: object,
    others: Sequence[str] = (),
    *,
    of_model: bool = False,
) -> UnsupportedBlockError:
    """The error that names a block, its class and the reason, which holds for `others` too."""
    return UnsupportedBlockError(
        f"block {name or 'the model'!r} ({type(module).__name__}) cannot be made skippable: {why}",
        blocks=(name, *others),
        of_model=of_model,
    )


def with_remedy(
    error: UnsupportedBlockError,
    left_out: Iterable[str],
    kept: Iterable[str],
    tried_all: bool = True,
    registered: str = "",
    as_whole: bool = False,
) -> UnsupportedBlockError:
    """`error` with a sentence that says what to leave out.

    Args:
        left_out: names of the blocks that cannot be skipped.
        kept: names of the blocks that can be skipped without them.
        tried_all: whether every block was tried; relevant if `kept` is empty.
        registered: `registered_functions` of the blocks that the error names.
        as_whole: whether all can be skipped with one gate for all additions of a block.
    """
    out, rest = list(dict.fromkeys(left_out)), list(dict.fromkeys(kept))
    if rest and any(is_inside(name, outer) for name in rest for outer in out):
        remedy = f"include={_around(rest, out)!r} leaves unchanged what cannot be skipped"
    elif rest:
        what = "it unchanged" if len(out) == 1 else "them unchanged"
        remedy = f"exclude={out!r} leaves {what}"
    elif as_whole:
        remedy = ""
    elif tried_all:
        remedy = "no other block of the model can be skipped"
    else:
        remedy = "no other block of the model can be skipped, as far as was tried"
    if as_whole:
        whole = 'granularity="block" skips all additions of a block together, which works'
        remedy = f"{whole}; or {remedy}" if remedy else whole
    how = "tell sd.apply how to skip it, with sd.register_unit, or build it from sd.Residual"
    if registered:
        how = f"look at {registered}: {REGISTERED_RESULT}"
    return UnsupportedBlockError(
        f"{error}; {remedy}; {'or ' if rest or as_whole else ''}{how}", blocks=error.blocks
    )


REGISTERED_RESULT = (
    "with its gate closed it must call no module of the branch, and return the shortcut without "
    "the branch, and anything else as the original does; with its gate open it must compute the "
    "branch from gate.select of its input, and add gate.scale of the result"
)
"""What a registered function has to do."""


def registered_functions(found: Iterable[FoundBlock]) -> str:
    """The functions registered for the classes of these blocks; empty if there are none."""
    functions = {
        type(owner).__name__: full_name(edit.forward)
        for block in found
        for unit in block.units
        for owner, edit in unit.edits
        if isinstance(edit, RegisteredEdit)
    }
    named = (f"{name}, which sd.register_unit has for {cls}" for cls, name in functions.items())
    return ", and ".join(named)


def is_inside(name: str, outer: str) -> bool:
    """Whether the module `name` is inside the module `outer`, judging by their names."""
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _branch(name: str) -> str:
    """The name of the branch of the `Residual` unit `name`."""
    return f"{name}.branch" if name else "branch"


def _around(names: Sequence[str], without: Sequence[str]) -> list[str]:
    """The outermost modules that contain some of `names` and none of `without`."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        found[next(p for p in paths if not any(w == p or is_inside(w, p) for w in without))] = None
    return list(found)


def residual_block(name: str, module: Residual, flops: int) -> FoundBlock:
    """The block of a `Residual` unit."""
    parameters = tuple(inner for inner, _ in module.branch.named_parameters(_branch(name)))
    shortcut = "identity" if module.shortcut is None else "projection"
    return FoundBlock(
        name=name,
        module=module,
        shortcut=shortcut,
        units=(),
        modules=Counter(),
        parameters=parameters,
        flops=flops,
    )
