"""Additions that are not residual, each with the reason that `sd.plan` and errors show."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from stochastic_depth.surgery.addition_functions import Side
from stochastic_depth.surgery.frames import methods_of
from stochastic_depth.surgery.record.shortcuts import mixing
from stochastic_depth.surgery.record.trace import Call, Recording

COUPLING = "a one-sided coupling layer: one half is updated from the other, and never the reverse"
REPEATED = "it adds the same value repeatedly, like a bias that layers share"
OTHER_SHAPE = "its two operands have different shapes"
SHORTCUT_BROADCAST = (
    "its shortcut has no batch dimension, and is broadcast to the samples of its branch, like a "
    "learned array of latents: expand it before the branch is computed from it, as in "
    "l = l.expand(len(x), -1, -1); l = l + f(l, x)"
)
BRANCH_BROADCAST = (
    "its branch is broadcast to the shape of its shortcut: write it as x + f(x).expand_as(x)"
)
SCALED = (
    "its shortcut is the operand that the addition scales (alpha of torch.add, a factor of "
    "torch.addcmul): write it as alpha * x + f(x)"
)

PRODUCTS = ("addmm", "baddbmm", "addbmm", "addmv", "addr")
OTHER_FORMS = {
    **{
        name: f"the addition is part of a product ({name}): write it as x + a @ b"
        for name in PRODUCTS
    },
    **dict.fromkeys(("sub", "subtract"), "a subtraction: write it as x + -f(x)"),
    "lerp": "a weighted mean (lerp): write it as x + w * (f(x) - x)",
    "addcdiv": "it adds a quotient (addcdiv): write it as x + a / b",
    **{
        name: f"it adds to some of the values ({name}): write it as "
        f"x + torch.zeros_like(x).{name}(dim, index, f(x))"
        for name in ("index_add", "scatter_add")
    },
}
"""Functions other than additions that may add a branch to a shortcut, by name, each with the reason
why it is rejected, and the remedy."""


@dataclass(frozen=True)
class Rejected:
    """An addition of computed values that is not residual."""

    owner: str
    """Name of the module whose code adds."""
    location: str
    """The location of the addition in the source, as far as it is known."""
    reason: str


def listed(rejected: Sequence[Rejected]) -> tuple[str, ...]:
    """One line for each location and reason, with the number of modules that share both."""
    owners: dict[tuple[str, str], dict[str, None]] = {}
    for each in rejected:
        owners.setdefault((each.location, each.reason), {})[each.owner or "the model"] = None
    return tuple(
        f"{next(iter(names))!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, "
        f"{location}: {reason}"
        for (location, reason), names in owners.items()
    )


def own_backward(function: str) -> str:
    """The reason why an addition inside an `autograd.Function` cannot have a gate."""
    return (
        f"it is computed within {function}, an autograd.Function whose backward recomputes "
        "branches without gates, as reversible layers do: run the layers without it, or under "
        "torch.utils.checkpoint"
    )


class Rejections:
    """Collects the rejected additions of a forward pass while it is recorded."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.rejected: dict[tuple[str, str], Rejected] = {}
        """The first rejected addition at each location of each module."""

    def add(self, rejected: Rejected) -> None:
        self.rejected.setdefault((rejected.owner, rejected.location), rejected)

    def reject(self, frame: FrameType, operands: Sequence[int], reason: str) -> None:
        """Record an addition made in `frame`, if all of its operands are computed values."""
        if all(map(self._is_computed, operands)):
            self.add(self.rejection(frame, reason))

    def rejection(self, frame: FrameType, reason: str) -> Rejected:
        """Describe the addition that is being made in `frame`."""
        call = self.recording.calls[-1]
        location = next((m.location for m in methods_of(call.module, frame) if m.location), None)
        return Rejected(call.name, str(location or "in a function"), reason)

    def sum_of_stack(self, operands: tuple[int | None, ...], frame: FrameType) -> None:
        """Reject `torch.stack([x, f(x)]).sum(0)`."""
        stacked = operands[0] if operands else None
        if stacked is None or not self.recording.calls:
            return
        value = self.recording.values[stacked]
        if value.made_by in ("stack", "vstack", "dstack", "hstack") and len(value.parents) > 1:
            reason = "a sum over a stack of tensors: write it as x + f(x)"
            self.reject(frame, value.parents, reason)

    def other_form(self, name: str, total: int, frame: FrameType) -> None:
        """Reject a residual addition that one of `OTHER_FORMS` makes, with the result `total`."""
        first, *others = self.recording.values[total].parents
        if not others or not self.recording.calls:
            return
        pairs = [(first, other) for other in others]
        if name == "lerp":
            pairs.append((others[0], first))
        for shortcut, added in pairs:
            if name in PRODUCTS:  # whose first operand may be a bias that layers share
                if shortcut in self.recording.reach(added, shortcut):
                    self.reject(frame, [shortcut, added], OTHER_FORMS[name])
            elif self._is_branch(added, shortcut):
                self.add(self.rejection(frame, OTHER_FORMS[name]))

    def other_shape(
        self, left: int, right: int, total: int, repeated: set[int], frame: FrameType
    ) -> None:
        """Reject an addition of two values of different shapes.

        Args:
            repeated: the operands that the same expression has added before.
        """
        shapes = {n: self.recording.values[n].tensor.shape for n in (left, right, total)}
        for shortcut, added in ((left, right), (right, left)):
            if shortcut in repeated or not self._is_branch(added, shortcut):
                continue
            sample = shapes[total][1:]
            if shapes[added] == shapes[total] and shapes[shortcut] in (sample, (1, *sample)):
                self.add(self.rejection(frame, SHORTCUT_BROADCAST))
                return
            if shapes[shortcut] == shapes[total]:
                self.add(self.rejection(frame, BRANCH_BROADCAST))
                return
        self.reject(frame, [left, right], OTHER_SHAPE)

    def why_not(self, left: int, right: int, side: Side | None, call: Call) -> str:
        """The reason why an addition during `call` is not residual; empty if it is residual.

        Args:
            side: which operand is the shortcut; None if neither can be.
        """
        if self.recording.values[left].tensor.numel() < 2:
            return "it adds single numbers, such as losses"
        if side is None:
            return (
                "parallel branches: neither operand was computed from the other, nor is one a "
                "projection of a value from which the other was computed too"
            )
        shortcut, added = (left, right) if side == 0 else (right, left)
        if not mixing(self.recording, self.recording.reach_without(added, shortcut, call)):
            return "its branch mixes nothing: it has no product, convolution or pooling"
        return ""

    def _is_branch(self, added: int, shortcut: int) -> bool:
        """Whether `added` was computed from `shortcut`, by functions of which one mixes."""
        made = self.recording.reach(added, shortcut)
        return shortcut in made and mixing(self.recording, made - {shortcut})

    def _is_computed(self, number: int) -> bool:
        """Whether a value is an input of the running module, or is computed by mixing inputs."""
        call = self.recording.calls[-1]
        if number in call.inputs:
            return True
        return mixing(self.recording, self.recording.reach_within(number, call))
