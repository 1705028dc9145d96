"""The edits that put a branch under a gate, each at a place in the source or in a module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stochastic_depth.surgery.addition_functions import Side
from stochastic_depth.surgery.frames import CallSite, SourceLocation
from stochastic_depth.tensors import Promotion

NOT_REACHED = (
    "the residual addition of this block did not run in this pass: the model took a different path "
    "than on the example, and nothing on that path is skipped. Give sd.apply an example that takes "
    "it"
)
"""The message for a pass that bypasses the addition of a block."""
NOT_ON_EXAMPLE = (
    "the model adds here on a path that it does not take on the example, so this is not skipped. "
    "Give sd.apply an example that takes it"
)
"""The message for a pass that makes an addition which the example does not show."""
BRANCH_NOT_SEEN = (
    "the output of its modules does not reach the addition as one tensor: it is written into "
    "another tensor in place (write it as torch.zeros_like(x).index_put((i,), f(x[i])), or by "
    "torch.cat or F.pad), or the model branches on its values"
)
"""The reason why a deferred block cannot be closed on the example on which it was found."""
CallParameter = tuple[int | None, str | None]
"""A parameter of a function: its position, or None; and its name, or None if that is unknown."""


@dataclass(frozen=True)
class AdditionEdit:
    """An addition in a method.

    With a closed gate the addition returns its shortcut, and no code of its branch runs.
    """

    location: SourceLocation
    side: Side
    within: CallParameter | None = None
    """If the method calls a function that adds: which parameter of it is the shortcut."""
    callers: tuple[SourceLocation, ...] = ()
    """The calls by which other methods of the module reach this one, innermost first."""
    copies: bool = False
    """Whether to return a copy of the shortcut, because later code may change the sum in place."""
    promotion: Promotion | None = None
    """How the shortcut gets the dtype of the sum; None if it has it."""
    not_shown: tuple[SourceLocation, ...] = ()
    """Additions alike in the same method that the example does not reach."""

    def __str__(self) -> str:
        return str(self.location)


@dataclass(frozen=True)
class ArgumentEdit:
    """A call, in a method, that passes a value of the branch to the module or method that adds.

    With a closed gate the call receives None.
    """

    location: SourceLocation
    arguments: tuple[CallParameter, ...]
    callers: tuple[SourceLocation, ...] = ()


@dataclass(frozen=True)
class RegisteredEdit:
    """A whole module whose forward method was registered with `sd.register_unit`."""

    forward: Callable[..., Any]


@dataclass(frozen=True)
class BranchCalls:
    """The calls of one module that belong to a branch, during one call of the owner."""

    module: str
    """The name of the module, relative to the owner."""
    indices: tuple[int, ...]
    """Which of the module's calls belong to the branch, counted from 0."""
    count: int
    """How often the module is called in all. If each belongs to this branch, a later pass may make
    more; if each belongs to some branch, it may make fewer."""
    return_tensors: bool
    """Whether each of them returned a tensor, rather than a tuple or another structure."""

    @property
    def always(self) -> bool:
        """Whether all calls of the module belong to the branch."""
        return len(self.indices) == self.count


@dataclass(frozen=True)
class DeferredEdit:
    """A deferred residual addition, as an edit of the module in which all of its branch runs."""

    block: str
    """The name of its block."""
    number: int
    """The number of this addition among those of its owner."""
    sites: tuple[tuple[CallSite, Side], ...]
    """The expressions that make the addition, each with its shortcut's side. There are two if
    training mode and evaluation use different expressions."""
    calls: tuple[BranchCalls, ...]
    copies: bool
    """As `AdditionEdit.copies`."""
    promotion: Promotion | None = None
    """As `AdditionEdit.promotion`."""

    def __str__(self) -> str:
        return f"the addition in {self.sites[0][0][1]}"


@dataclass(frozen=True)
class EntryEdit:
    """The model itself, which makes the deferred calls that its outputs need before it returns."""


RewriteEdit = AdditionEdit | ArgumentEdit
Edit = RewriteEdit | RegisteredEdit | DeferredEdit | EntryEdit
