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
from stochastic_depth.surgery.trace import Call, Recording, recorded
from stochastic_depth.tensors import tensors_in

MIXES = (
    "linear",
    "conv",
    "mm",
    "matmul",
    "einsum",
    "attention",
    "pool",
    "fft",
    "lstm",
    "gru",
    "rnn",
    "unseen",
)
"""Parts of the names of functions of which a branch has at least one: what only adds to, scales or
bends a value (an activation written out, a rotary embedding, a normalisation) is no branch."""


ACTIVATIONS = ("relu", "gelu", "silu", "swish", "sigmoid", "tanh", "elu", "mish", "softmax", "glu")
"""Parts of the names of functions that no projection shortcut has."""


SPLITS = {"chunk", "split", "unbind", "__getitem__", "narrow", "tensor_split"}


UPSAMPLES = ("interpolate", "upsample", "conv_transpose", "pixel_shuffle")


PROJECTIONS = ("shortcut", "skip", "down", "proj", "ident", "res")
"""Parts of the names of modules that project what could have passed by as it is."""


Edits = tuple[tuple[str, Sliced | None], ...]
"""Modules by name, and where to edit them: the one that adds first; None where no method is."""


@dataclass(frozen=True)
class Addition:
    """A residual addition, and the computation of its branch."""

    owner: str
    """Name of the module in which its branch begins: the one that adds, or one that calls it."""
    edits: Edits
    identity: bool
    """Whether the shortcut is the very value that the branch was computed from."""
    begins_elsewhere: bool = False
    """Whether not even the owner computes all of the branch."""
    modules: tuple[str, ...] = ()
    """Names of the modules that ran for the branch, inside of the owner; one for each call."""
    parameters: frozenset[str] = frozenset()
    """Names of the parameters that the branch uses, inside of the owner."""
    flops: int = 0
    """Of the branch, in one forward pass; 0 where they were not asked for."""
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
    search = _Search(Recording(model))
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
    if passed is not None:
        passed += search.passed.values()
    outputs = search.recording.numbers(output)
    analysis = Analysis(search.recording, outputs, _is_mixing, search.occurrences)
    return search.result(outputs), analysis


class _Search:
    """Looks at every addition of a forward pass while it is recorded."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.found: dict[tuple[str, Edits], Addition] = {}
        self.snapshots: defaultdict[tuple[str, Edits], list[Snapshot]] = defaultdict(list)
        self.sums: dict[int, tuple[tuple[str, Edits], int]] = {}
        """Results of residual additions: which one, and the value of its shortcut."""
        self.occurrences: Counter[Site] = Counter()
        """How often each expression has added."""
        self.added: dict[tuple[CodeType, int, int], list[int]] = {}
        """Which expressions have added which values."""
        self.passed: dict[tuple[str, str], Passed] = {}

    def result(self, outputs: set[int]) -> list[Addition]:
        """All that were found, once the model has given its outputs."""
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
        if left is None or right is None or left == right:
            return
        if not self._are_alike(left, right):
            self._pass(frame, [left, right], "what is added is of another shape than the sum")
            return
        again = self._added_again(left, right, self.recording.number(out), frame)
        call = self.recording.calls[-1]
        of = self._reaches(left, right, call)
        side = self._side_of_shortcut(left, right, of, call)
        kept = left if side == "left" else right
        reason = self._why_not(left, right, side, of, call)
        if side is not None and kept not in again and not reason:
            identity = left in of[1] or right in of[0]
            self._note(left, right, side, identity, self.recording.number(out), frame)
        else:
            reason = reason or "it adds the same value again and again, as a bias that layers share"
            self._pass(frame, [left, right], reason)

    def _pass(self, frame: FrameType, operands: Sequence[int], reason: str) -> None:
        """Note an addition of computed values that is no residual one."""
        if not all(map(self._is_computed, operands)):
            return
        call = self.recording.calls[-1]
        place = next((m.place for m in methods_of(call.module, frame) if m.place), None)
        noted = Passed(call.name, str(place or "in a function"), reason)
        self.passed.setdefault((noted.owner, noted.place), noted)

    def _is_computed(self, number: int) -> bool:
        """Whether a value is an input of the module at work, or mixes what comes of one."""
        call = self.recording.calls[-1]
        if number in call.inputs:
            return True
        return bool(self._mixes(self.recording.reach(number, min([call.began, *call.inputs]))))

    def _sum_of_stack(self, operands: tuple[int | None, ...], frame: FrameType) -> None:
        """Note `torch.stack([x, f(x)]).sum(0)`."""
        stacked = operands[0] if operands else None
        if stacked is None or not self.recording.calls:
            return
        value = self.recording.values[stacked]
        if value.made_by in ("stack", "vstack", "dstack", "hstack") and len(value.parents) > 1:
            self._pass(frame, value.parents, "a sum over a stack of tensors: write it as x + f(x)")

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
        if not self._mixes(branch):
            return "what is added mixes nothing: it has no product, convolution, pooling"
        return ""

    def _is_mixed_later(self, value: int) -> bool:
        """Whether any function with weights uses what comes of a value."""
        seen, ahead = {value}, [value]
        while ahead:
            for child in self.recording.values[ahead.pop()].children:
                if self._mixes({child}):
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

    def _side_of_shortcut(
        self, left: int, right: int, of: list[set[int]], call: Call
    ) -> Side | None:
        """Which operand is the shortcut, if the addition is residual."""
        if left in of[1]:
            return "left"
        if right in of[0]:
            return "right"
        if not (call.inputs & of[0] and call.inputs & of[1]):
            return None
        if (left in self.sums) != (right in self.sums):  # x + f(x) + g(x)
            return "left" if left in self.sums else "right"
        made = [sum(value >= call.began for value in values) for values in of]
        if made[0] < made[1] and self._is_projection(of[0], of[1]):
            return "left"
        if made[1] < made[0] and self._is_projection(of[1], of[0]):
            return "right"
        return None

    def _is_projection(self, shortcut: set[int], branch: set[int]) -> bool:
        """Whether one operand is a projection of a single value from which the other starts too.

        A highway's carry, (1 - t(x)) * x, is computed from two values. A projection convolves less
        often than the branch and has no activation function: parallel branches are none of each
        other. One that does not change the shape has a name that says so. A part of a value is no
        shortcut for a branch that starts from the other part (a coupling layer). What adds a branch
        of its own is none.
        """
        shared = shortcut & branch
        own, others = shortcut - shared, branch - shared
        values = self.recording.values
        starts = {p for value in own for p in values[value].parents if p in shared}
        convolutions = self._convolutions(own)
        if len(starts) != 1 or convolutions >= self._convolutions(branch):
            return False
        functions = self.recording.functions(own)
        if any(part in function for function in functions for part in ACTIVATIONS):
            return False
        if not own.isdisjoint(self.sums):
            return False
        (start,) = starts
        first = {values[value].made_by for value in others if start in values[value].parents}
        if not convolutions:
            return not (functions and set(functions) | first <= SPLITS)
        changes = values[start].tensor.shape != values[max(own)].tensor.shape
        return changes or any(part in name for name in self._names(own) for part in PROJECTIONS)

    def _names(self, values: set[int]) -> list[str]:
        """The last parts of the names of the modules that ran for `values`, and of parameters."""
        parents = {p for value in values for p in self.recording.values[value].parents}
        names = [*self.recording.modules(values, 0), *self.recording.parameters(parents)]
        return [part for name in names for part in name.lower().split(".")[-3:]]

    def _mixes(self, values: set[int]) -> list[str]:
        """The functions among those that made `values` of which a branch has at least one."""
        functions = self.recording.functions(values)
        return list(filter(_is_mixing, functions))

    def _convolutions(self, values: set[int]) -> int:
        """How many of `values` were made by a function with weights."""
        return sum("pool" not in function for function in self._mixes(values))

    def _note(
        self, left: int, right: int, side: Side, identity: bool, total: int, frame: FrameType
    ) -> None:
        """Follow a residual addition to where its branch begins, and note it."""
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
        key = call.name, tuple(edits)
        before = self.found.get(key) or Addition(*key, identity)
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
        )
        self.found[key] = replace(
            before,
            begins_elsewhere=before.begins_elsewhere or bool(handed),
            modules=before.modules + self.recording.modules(branch, call.began),
            parameters=before.parameters | self.recording.parameters(branch),
            upsamples=before.upsamples
            or any(part in f for f in self.recording.functions(branch) for part in UPSAMPLES),
            flops=before.flops + sum(self.recording.values[value].flops for value in branch),
            events=(*before.events, event),
        )
        self.sums[total] = key, kept
        self.snapshots[key].append(take_snapshot(self.recording, total, frames, branch))

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
            return kept in made and bool(self._mixes(made - self.recording.reach(kept, kept)))

        positional = [((n, None), value) for n, value in enumerate(call.args)]
        named = [((None, name), value) for name, value in call.kwargs.items()]
        return tuple(
            parameter
            for parameter, value in [*positional, *named]
            if any(map(is_of_branch, tensors_in(value)))
        )


def _is_mixing(function: str) -> bool:
    return any(part in function for part in MIXES)


def _branch(of: list[set[int]], side: Side) -> set[int]:
    """What one operand was computed from, and not the shortcut."""
    return of[1] - of[0] if side == "left" else of[0] - of[1]


def _places(methods: list[Method]) -> tuple[Place | None, tuple[Caller, ...]]:
    """Where the innermost method stands, and where the others call it."""
    places = [method.place for method in methods]
    known = list(itertools.takewhile(lambda place: place is not None, places))
    return (known[0] if known else None), tuple(Caller(place) for place in known[1:] if place)
