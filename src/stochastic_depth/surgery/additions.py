"""Find the residual additions of a model by watching one forward pass.

A residual addition joins a value and something computed from it (an identity shortcut), or two
values computed from the same input of one module (a projection shortcut).
"""

import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

from torch import Tensor, nn

from stochastic_depth.errors import ExampleError, StochasticDepthError
from stochastic_depth.surgery.branches import Analysis, Event
from stochastic_depth.surgery.dead_variables import Snapshot, take_snapshot, with_dead_variables
from stochastic_depth.surgery.edits import (
    ADDITIONS,
    Argument,
    Caller,
    Method,
    Parameter,
    Place,
    Side,
    Site,
    Sliced,
    Sum,
    methods_of,
    site_of,
)
from stochastic_depth.surgery.shortcuts import Shortcuts, is_mixing
from stochastic_depth.surgery.trace import Call, Recording, recorded
from stochastic_depth.tensors import tensors_in
from stochastic_depth.torch_private import function_around

UPSAMPLES = ("interpolate", "upsample", "conv_transpose", "pixel_shuffle")


PRODUCTS = {"addmm", "baddbmm", "addbmm", "addmv", "addr"}
"""Names of functions that add to a product."""


COUPLING = (
    "a coupling: it adds to one part of a value, or to one stream, what is computed from another, "
    "to which nothing that comes of it is added in turn"
)


Edits = tuple[tuple[str, Sliced | None], ...]
"""Modules by name, and where to edit them: the one that adds first; None where no method is."""


@dataclass(frozen=True)
class Addition:
    """A residual addition, and the computation of its branch."""

    owner: str
    """Name of the module in which its branch begins: the one that adds, or one that calls it."""
    edits: Edits
    identity: bool
    """Whether the shortcut is what the branch was computed from, or another part of that, as it is:
    no projection."""
    begins_elsewhere: bool = False
    """Whether not even the owner computes all of the branch."""
    modules: tuple[str, ...] = ()
    """Names of the modules that ran for the branch, inside of the owner; one for each call."""
    parameters: frozenset[str] = frozenset()
    """Names of the parameters that the branch uses, inside of the owner."""
    whole: bool = False
    """Whether the owner returns this sum, and was given its shortcut as first argument."""
    events: tuple[Event, ...] = ()
    """Each time that it was made."""
    upsamples: bool = False
    """Whether its branch makes its values larger again."""
    is_last: bool = False
    """Whether nothing mixes what comes of it: the model's output, or nearly."""


@dataclass(frozen=True)
class Passed:
    """An addition that was seen and is no residual one."""

    owner: str
    """Name of the module that adds."""
    place: str
    """Where in the source, as far as it is known."""
    reason: str


def own_backward(function: str) -> str:
    """Why an addition within an `autograd.Function` cannot be gated."""
    return (
        f"it is computed within {function}, an autograd.Function whose own backward pass knows no "
        "gates (that of reversible layers computes every branch again): run the layers without it, "
        "or under torch.utils.checkpoint"
    )


def discover(
    model: nn.Module,
    run: Callable[[], object],
    count_flops: bool = False,
    passed: list[Passed] | None = None,
    gradients: bool = False,
) -> tuple[list[Addition], Analysis]:
    """The residual additions of `model` in the order in which `run`, a forward pass, meets them.

    In training mode the pass updates statistics as any other: see `preserve_state`.

    Args:
        passed: gets the additions of computed values that are no residual ones.
        gradients: whether autograd is on, as in a training step.
    """
    search = _Search(Recording(model), gradients)
    with recorded(model, search.recording, search.made, search.returned, count_flops, gradients):
        try:
            output = run()
        except StochasticDepthError:
            raise
        except Exception as error:
            said = (str(error) or "no reason given").splitlines()[0]
            raise ExampleError(
                f"{type(model).__name__} does not run on the example ({type(error).__name__}: "
                f"{said}): example= is the inputs of one forward call, a tensor, a "
                "tuple of arguments, or a mapping of keyword arguments"
            ) from error
    outputs = search.recording.numbers(output)
    analysis = Analysis(search.recording, outputs, is_mixing, search.sites)
    analysis.output = output
    additions = search.result(outputs)
    if passed is not None:
        passed += search.passed.values()
    return additions, analysis


def listed(passed: Sequence[Passed]) -> tuple[str, ...]:
    """Additions that are not taken, those that are made by the same expression as one."""
    owners: dict[tuple[str, str], dict[str, None]] = {}
    for each in passed:
        owners.setdefault((each.place, each.reason), {})[each.owner or "the model"] = None
    return tuple(
        f"{next(iter(names))!r}{f' and {len(names) - 1} more' if len(names) > 1 else ''}, "
        f"{place}: {reason}"
        for (place, reason), names in owners.items()
    )


@dataclass(frozen=True)
class _Followed:
    """One residual addition, as it was followed while its methods were at work."""

    addition: Addition
    branch: set[int]
    snapshot: Snapshot


class _Search:
    """Looks at every addition of a forward pass while it is recorded."""

    def __init__(self, recording: Recording, training: bool) -> None:
        self.recording, self.training = recording, training
        self.found: dict[tuple[str, Edits], Addition] = {}
        self.snapshots: defaultdict[tuple[str, Edits], list[Snapshot]] = defaultdict(list)
        self.sums: dict[int, tuple[tuple[str, Edits], int]] = {}
        """Results of residual additions: which one, and the value of its shortcut."""
        self.occurrences: Counter[Site] = Counter()
        """How often each expression has added."""
        self.sites: Counter[Site] = Counter()
        """How often each has added two tensors."""
        self.added: dict[tuple[CodeType, int, int], list[int]] = {}
        """Which expressions have added which values."""
        self.passed: dict[tuple[str, str], Passed] = {}
        self.couplings: dict[int, tuple[_Followed, Passed]] = {}
        """Results of additions that are residual if the other part is added to in turn."""
        self.shortcuts = Shortcuts(recording, self.sums)

    def result(self, outputs: set[int]) -> list[Addition]:
        """All that were found, once the model has given its outputs."""
        for _, noted in self.couplings.values():
            self.passed.setdefault((noted.owner, noted.place), noted)
        return [
            replace(
                addition,
                edits=with_dead_variables(
                    self.recording, addition.edits, self.snapshots[key], outputs
                ),
                is_last=not any(self._is_mixed_later(s.total) for s in self.snapshots[key]),
            )
            for key, addition in self.found.items()
        ]

    def made(
        self, function: Callable[..., Any], operands: tuple[int | None, ...], out: Any
    ) -> None:
        """Look at what a function has computed from `operands`."""
        name = getattr(function, "__name__", "")
        if name.removesuffix("_") in PRODUCTS:
            self._inside_product(name, operands, sys._getframe(2))
        if name == "sum":
            self._sum_of_stack(operands, sys._getframe(2))
        if name not in ADDITIONS or len(operands) < 2:
            return
        frame = sys._getframe(2)  # of the expression that adds
        self.occurrences[site_of(frame)] += 1
        left, right, *factors = *operands, None, None
        if name.startswith("addcmul"):
            branches = [number for number in (right, *factors) if number is not None]
            right = max(branches, key=lambda n: len(self.recording.reach(n)), default=None)
        if not self.recording.calls:
            return
        if left is None or right is None:
            return
        self.sites[site_of(frame)] += 1
        if left == right:
            return
        if not self._are_alike(left, right):
            self._pass(frame, [left, right], "what is added is of another shape than the sum")
            return
        again = self._added_again(left, right, self.recording.number(out), frame)
        call = self.recording.calls[-1]
        of = self._reaches(left, right, call)
        side = self.shortcuts.side(left, right, of, call)
        kept = left if side == "left" else right
        reason = self._why_not(left, right, side, of, call)
        total = self.recording.number(out)
        if around := function_around(frame):
            reason = own_backward(around)
        if side is not None and kept not in again and not reason:
            identity = left in of[1] or right in of[0]
            self._join(self._followed(left, right, side, identity, total, frame))
        elif side is None and not around and (part := self.shortcuts.part(left, right, of, call)):
            followed = self._followed(left, right, part, True, total, frame)
            if not self._joins_both(followed):
                self.couplings[total] = followed, self._passed(frame, COUPLING)
        else:
            reason = reason or "it adds the same value again and again, as a bias that layers share"
            self._pass(frame, [left, right], reason)

    def _pass(self, frame: FrameType, operands: Sequence[int], reason: str) -> None:
        """Note an addition of computed values that is no residual one."""
        if all(map(self._is_computed, operands)):
            noted = self._passed(frame, reason)
            self.passed.setdefault((noted.owner, noted.place), noted)

    def _passed(self, frame: FrameType, reason: str) -> Passed:
        call = self.recording.calls[-1]
        place = next((m.place for m in methods_of(call.module, frame) if m.place), None)
        return Passed(call.name, str(place or "in a function"), reason)

    def _is_computed(self, number: int) -> bool:
        """Whether a value is an input of the module at work, or mixes what comes of one."""
        call = self.recording.calls[-1]
        if number in call.inputs:
            return True
        return bool(
            self.shortcuts.mixes(self.recording.reach(number, min([call.began, *call.inputs])))
        )

    def _sum_of_stack(self, operands: tuple[int | None, ...], frame: FrameType) -> None:
        """Note `torch.stack([x, f(x)]).sum(0)`."""
        stacked = operands[0] if operands else None
        if stacked is None or not self.recording.calls:
            return
        value = self.recording.values[stacked]
        if value.made_by in ("stack", "vstack", "dstack", "hstack") and len(value.parents) > 1:
            self._pass(frame, value.parents, "a sum over a stack of tensors: write it as x + f(x)")

    def _inside_product(
        self, name: str, operands: tuple[int | None, ...], frame: FrameType
    ) -> None:
        """Note `torch.addmm(x, f(x), w)`."""
        first, *others = operands
        factors = [number for number in others if number is not None]
        if first is None or not self.recording.calls:
            return
        if any(first in self.recording.reach(number, first) for number in factors):
            reason = f"it is added inside of a product ({name}): write it as x + a @ b"
            self._pass(frame, [first, *factors[:1]], reason)

    def _why_not(
        self, left: int, right: int, side: Side | None, of: list[set[int]], call: Call
    ) -> str:
        """Why an addition is no residual one; empty if it is one."""
        if self.recording.values[left].tensor.numel() < 2:
            return "it adds single numbers, such as losses"
        if side is None:
            return (
                "neither of the two was computed from the other, nor is one a projection of a "
                "single value that the other starts from too: parallel branches"
            )
        branch = _branch(of, side)
        if not self.shortcuts.mixes(branch):
            return "what is added mixes nothing: it has no product, convolution, pooling"
        return ""

    def _is_mixed_later(self, value: int) -> bool:
        """Whether any function with weights uses what comes of a value."""
        seen, ahead = {value}, [value]
        while ahead:
            for child in self.recording.values[ahead.pop()].children:
                if self.shortcuts.mixes({child}):
                    return True
                if child not in seen:
                    seen.add(child)
                    ahead.append(child)
        return False

    def returned(self, call: Call, output: Any) -> None:
        """Note whether a module returns its first argument plus a branch."""
        given = call.args[0] if call.args else None
        if isinstance(output, Tensor) and isinstance(given, Tensor):
            key, kept = self.sums.get(self.recording.number(output), (None, None))
            if key is not None and key[0] == call.name:
                whole = self.recording.number(given) == kept
                self.found[key] = replace(self.found[key], whole=whole)

    def _are_alike(self, left: int, right: int) -> bool:
        values = self.recording.values
        return values[left].tensor.shape == values[right].tensor.shape

    def _added_again(self, left: int, right: int, total: int | None, frame: FrameType) -> set[int]:
        """Which of the two the same expression has added before: a bias that layers share.

        Parallel networks that begin with the same value add it too, each to what is its own.
        """
        again = set[int]()
        for value, other in ((left, right), (right, left)):
            before = self.added.setdefault((frame.f_code, frame.f_lasti, value), [])
            if before and not self.recording.reach(other, min(before)).isdisjoint(before):
                again.add(value)
            if total is not None:
                before.append(total)
        return again

    def _reaches(self, left: int, right: int, call: Call) -> list[set[int]]:
        """What the two were computed from, no further back than what `call` was given."""
        earliest = min([call.began, *call.inputs])
        return [self.recording.reach(left, earliest), self.recording.reach(right, earliest)]

    def _followed(
        self, left: int, right: int, side: Side, identity: bool, total: int, frame: FrameType
    ) -> "_Followed":
        """A residual addition, followed to where its branch begins."""
        kept = left if side == "left" else right
        edits: list[tuple[str, Sliced | None]] = []
        frames: list[list[FrameType]] = []
        handed: tuple[Parameter, ...] = ()
        branch: set[int] = set()
        call = self.recording.calls[-1]
        for call in reversed(self.recording.calls):
            methods = list(methods_of(call.module, frame))
            frames.append([method.frame for method in methods])
            if not edits:
                edit = self._sum(methods, side, kept)
            else:
                place, callers = _places(methods)
                edit = place and Argument(place, handed, callers=callers)
            edits.append((call.name, edit))
            branch = _branch(self._reaches(left, right, call), side)
            handed = self._handed(call, branch, kept)
            if not handed:
                break
        site = site_of(frame)
        event = Event(
            kept,
            right if side == "left" else left,
            total,
            0 if side == "left" else 1,
            site,
            self.occurrences[site] - 1,
            tuple(self.recording.calls),
            identity,
            self.training,
        )
        functions = self.recording.functions(branch)
        addition = Addition(
            call.name,
            tuple(edits),
            identity,
            begins_elsewhere=bool(handed),
            modules=self.recording.modules(branch, call.began),
            parameters=self.recording.parameters(branch),
            events=(event,),
            upsamples=any(part in function for function in functions for part in UPSAMPLES),
        )
        return _Followed(addition, branch, take_snapshot(self.recording, total, frames, branch))

    def _joins_both(self, followed: "_Followed") -> bool:
        """Note a coupling and one before it, each of which adds what comes of the other's part."""
        (new,) = followed.addition.events
        for total, (before, _) in self.couplings.items():
            (old,) = before.addition.events
            if old.kept in self.recording.reach(new.added) and new.kept in self.recording.reach(
                old.added
            ):
                del self.couplings[total]
                self._join(before)
                self._join(followed)
                return True
        return False

    def _join(self, followed: "_Followed") -> None:
        """Note a residual addition; and one that it shows to be residual, of another part."""
        new, (event,) = followed.addition, followed.addition.events
        for total in [total for total in self.couplings if total in followed.branch]:
            coupling, _ = self.couplings[total]
            if event.kept in self.recording.reach(coupling.addition.events[0].added):
                del self.couplings[total]
                self._join(coupling)
        key = new.owner, new.edits
        before = self.found.get(key)
        self.found[key] = (
            new
            if before is None
            else replace(
                before,
                begins_elsewhere=before.begins_elsewhere or new.begins_elsewhere,
                modules=before.modules + new.modules,
                parameters=before.parameters | new.parameters,
                upsamples=before.upsamples or new.upsamples,
                events=before.events + new.events,
            )
        )
        self.sums[event.total] = key, event.kept
        self.snapshots[key].append(followed.snapshot)

    def _sum(self, methods: list[Method], side: Side, kept: int) -> Sum | None:
        """Where the innermost of `methods` adds, or calls a function that does."""
        place, callers = _places(methods)
        function = methods[0].called if methods else None
        if place is None or function is None:
            return place and Sum(place, side, callers=callers)
        code = function.f_code
        for n, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]):
            value = function.f_locals.get(name)
            if isinstance(value, Tensor) and self.recording.number(value) == kept:
                position = n if n < code.co_argcount else None
                return Sum(place, side, (position, name), callers=callers)
        return None

    def _handed(self, call: Call, branch: set[int], kept: int) -> tuple[Parameter, ...]:
        """The arguments of `call` that hold a part of the branch, computed before."""

        def is_of_branch(tensor: Tensor) -> bool:
            value = self.recording.number(tensor)
            if value not in branch or value >= call.began:
                return False
            made = self.recording.reach(value, kept)
            return kept in made and bool(
                self.shortcuts.mixes(made - self.recording.reach(kept, kept))
            )

        positional = [((n, None), value) for n, value in enumerate(call.args)]
        named = [((None, name), value) for name, value in call.kwargs.items()]
        return tuple(
            parameter
            for parameter, value in [*positional, *named]
            if any(map(is_of_branch, tensors_in(value)))
        )


def _branch(of: list[set[int]], side: Side) -> set[int]:
    """What one operand was computed from, and not the shortcut."""
    return of[1] - of[0] if side == "left" else of[0] - of[1]


def _places(methods: list[Method]) -> tuple[Place | None, tuple[Caller, ...]]:
    """Where the innermost method stands, and where the others call it."""
    places = [method.place for method in methods]
    known = list(itertools.takewhile(lambda place: place is not None, places))
    return (known[0] if known else None), tuple(Caller(place) for place in known[1:] if place)
