"""Find the residual additions of a model by recording one forward pass.

A residual addition adds a value and something that was computed from it (an identity shortcut), or
two values that were computed from the same input of one module (a projection shortcut).
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

from torch import nn

from stochastic_depth.errors import ExampleError, StochasticDepthError, first_line
from stochastic_depth.surgery.addition_functions import ADDITIONS, Side
from stochastic_depth.surgery.frames import CallSite, call_site_of
from stochastic_depth.surgery.record.branch_source import (
    Addition,
    Edits,
    locate,
    with_copies,
)
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis
from stochastic_depth.surgery.record.rejected import (
    COUPLING,
    OTHER_FORMS,
    REPEATED,
    SCALED,
    Rejected,
    Rejections,
    own_backward,
)
from stochastic_depth.surgery.record.shortcuts import Shortcuts, is_mixing
from stochastic_depth.surgery.record.trace import PRODUCT, Call, Recording, recorded
from stochastic_depth.torch_private import function_around

Key = tuple[str, Edits]
"""Identifies an addition by its owner and its edits."""


def discover(
    model: nn.Module,
    run: Callable[[], object],
    *,
    count_flops: bool,
    gradients: bool,
) -> tuple[list[Addition], Analysis, list[Rejected]]:
    """The residual additions of `model`, in the order in which the forward pass `run` makes them.

    In training mode the pass updates statistics, as any other does: see `preserve_state`.

    Args:
        gradients: whether autograd is enabled, as in a training step.

    Returns:
        The additions; what is known of the values of the pass; and the additions of computed values
        that are not residual.

    Raises:
        ExampleError: when the model does not run on the example.
    """
    search = _Search(Recording(model), gradients)
    with recorded(model, search.recording, search.on_function, count_flops, gradients):
        try:
            output = run()
        except StochasticDepthError:
            raise
        except Exception as error:
            raise ExampleError(
                f"{type(model).__name__} does not run on the example ({type(error).__name__}: "
                f"{first_line(error)}): example= is the inputs of one forward call, a tensor, a "
                "tuple of arguments, or a mapping of keyword arguments"
            ) from error
    outputs = search.recording.numbers(output)
    analysis = Analysis(search.recording, outputs, is_mixing, search.sites, search.functions)
    analysis.output = output
    additions = search.result()
    return additions, analysis, list(search.rejections.rejected.values())


class _Search:
    """Judges every addition of a forward pass while it is recorded."""

    def __init__(self, recording: Recording, training: bool) -> None:
        self.recording, self.training = recording, training
        self.found: dict[Key, Addition] = {}
        self.sums = set[int]()
        """The results of residual additions."""
        self.occurrences: Counter[CallSite] = Counter()
        """How often each expression has been evaluated."""
        self.sites: Counter[CallSite] = Counter()
        """How often each expression has added two tensors."""
        self.functions: dict[CallSite, str] = {}
        """The expressions that add inside an `autograd.Function`, each with the name of that
        function."""
        self.added: dict[tuple[CodeType, int, int], list[int]] = {}
        """For each expression and each value that it has added, the results of these additions."""
        self.couplings: dict[int, tuple[Addition, Rejected]] = {}
        """By result: additions to one stream that are residual only if the other stream is added
        to as well, and the rejection if it is not."""
        self.shortcuts = Shortcuts(recording, self.sums)
        self.rejections = Rejections(recording, self.shortcuts)

    def result(self) -> list[Addition]:
        """All residual additions, after the model has returned."""
        for _, rejected in self.couplings.values():
            self.rejections.add(rejected)
        return [
            replace(
                addition,
                edits=with_copies(self.recording, addition.edits, addition.events),
                is_last=not any(self._is_mixed_later(e.total) for e in addition.events),
            )
            for addition in self.found.values()
        ]

    def on_function(
        self,
        function: Callable[..., Any],
        operands: tuple[int | None, ...],
        out: Any,
        scales_second: bool,
    ) -> None:
        """Judge the result of a function of `operands`, if it is an addition."""
        name = getattr(function, "__name__", "")
        frame = sys._getframe(2)  # the frame of the expression that calls the function
        if (form := name.removesuffix("_")) in OTHER_FORMS:
            self.rejections.other_form(form, self.recording.number(out), frame)
        if name == "sum":
            self.rejections.sum_of_stack(operands, frame)
        if name not in ADDITIONS or len(operands) < 2:
            return
        self.occurrences[call_site_of(frame)] += 1
        left, right, *_ = operands
        if not self.recording.calls or left is None or right is None:
            return
        self.sites[call_site_of(frame)] += 1
        if left != right:
            self._judge(left, right, self.recording.number(out), frame, scales_second)

    def _is_shortcut_of(self, branch: int, scaled: int, call: Call) -> bool:
        """Whether the operand `scaled`, or a factor of it if it is a product, is the shortcut."""
        values = self.recording.values
        factors = values[scaled].parents if values[scaled].made_by == PRODUCT else ()
        for operand in (scaled, *factors):
            reached = [self.recording.reach_within(value, call) for value in (branch, operand)]
            side = self.shortcuts.side(branch, operand, reached, call)
            if side is None:
                side = self.shortcuts.part(branch, operand, reached, call)
            if side == 1:
                return True
        return False

    def _judge(
        self, left: int, right: int, total: int, frame: FrameType, scales_right: bool
    ) -> None:
        """Decide whether an addition of two values is residual; record it or the reason why not."""
        values, call = self.recording.values, self.recording.calls[-1]
        repeated = self._added_before(left, right, total, frame)
        if values[left].tensor.shape != values[right].tensor.shape:
            self.rejections.other_shape(left, right, total, repeated, frame)
            return
        reached = [self.recording.reach_within(value, call) for value in (left, right)]
        side = self.shortcuts.side(left, right, reached, call)
        reason = self.rejections.why_not(left, right, side, call)
        part = self.shortcuts.part(left, right, reached, call) if side is None else None
        if scales_right and self._is_shortcut_of(left, right, call):
            self.rejections.add(self.rejections.described(frame, SCALED))
            return
        if function := function_around(frame):
            reason = own_backward(function)
            self.functions[call_site_of(frame)] = function
        if side is not None and not reason and (left, right)[side] not in repeated:
            identity = left in reached[1] or right in reached[0]
            self._join(self._located(left, right, side, identity, total, frame))
        elif part is not None and not function:
            addition = self._located(left, right, part, True, total, frame)
            if not self._completes_coupling(addition):
                self.couplings[total] = addition, self.rejections.described(frame, COUPLING)
        else:
            self.rejections.reject(frame, [left, right], reason or REPEATED)

    def _located(
        self, left: int, right: int, side: Side, identity: bool, total: int, frame: FrameType
    ) -> Addition:
        """The addition of `left` and `right`, with this execution of it as its event."""
        operands = left, right
        site = call_site_of(frame)
        event = AdditionEvent(
            operands[side],
            operands[1 - side],
            total,
            side,
            site,
            self.occurrences[site] - 1,
            tuple(self.recording.calls),
            identity,
            self.training,
        )
        return locate(self.recording, event, frame, self.shortcuts.mixes)

    def _added_before(self, left: int, right: int, total: int, frame: FrameType) -> set[int]:
        """The operands that the same expression has added before, such as a bias that layers share.

        Parallel networks may begin with the same value, and each add it to a different value. Such
        an operand is not returned.
        """
        repeated = set[int]()
        for value, other in ((left, right), (right, left)):
            before = self.added.setdefault((frame.f_code, frame.f_lasti, value), [])
            if before and not self.recording.reach(other, min(before)).isdisjoint(before):
                repeated.add(value)
            before.append(total)
        return repeated

    def _completes_coupling(self, addition: Addition) -> bool:
        """Record a coupling and an earlier one, if each adds to the stream of the other."""
        (new,) = addition.events
        for total, (before, _) in self.couplings.items():
            (old,) = before.events
            reaches_old = old.shortcut in self.recording.reach(new.added)
            if reaches_old and new.shortcut in self.recording.reach(old.added):
                del self.couplings[total]
                self._join(before)
                self._join(addition)
                return True
        return False

    def _join(self, new: Addition) -> None:
        """Record a residual addition, and earlier couplings that are residual because of it."""
        (event,) = new.events
        for total in [total for total in self.couplings if total in event.branch]:
            coupling, _ = self.couplings[total]
            if event.shortcut in self.recording.reach(coupling.events[0].added):
                del self.couplings[total]
                self._join(replace(coupling, coupled=event))
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
        self.sums.add(event.total)

    def _is_mixed_later(self, value: int) -> bool:
        """Whether any function with weights uses a value, or anything that is computed from it."""
        seen, ahead = {value}, [value]
        while ahead:
            for child in self.recording.values[ahead.pop()].children:
                if self.shortcuts.mixes({child}):
                    return True
                if child not in seen:
                    seen.add(child)
                    ahead.append(child)
        return False
