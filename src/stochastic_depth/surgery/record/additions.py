"""Find the residual additions of a model by recording one forward pass.

A residual addition adds a value and something that was computed from it (an identity shortcut), or
two values that were computed from the same input of one module (a projection shortcut).
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from stochastic_depth.errors import ExampleError, StochasticDepthError, first_line
from stochastic_depth.surgery.addition_functions import ADDITIONS, Side
from stochastic_depth.surgery.frames import CallSite, call_site_of
from stochastic_depth.surgery.record.branch_source import (
    Addition,
    Edits,
    as_sums,
    locate,
    with_not_shown,
)
from stochastic_depth.surgery.record.branches import Analysis, Execution, Occurrence
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
from stochastic_depth.torch_private import function_around, is_called_by_compiled

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
            remedy = (
                "it has lazy layers, whose parameters get their shapes in a first call: run the "
                "model once, before this"
                if any(map(is_lazy, [*model.parameters(), *model.buffers()]))
                else "example= is the inputs of one forward call, a tensor, a tuple of arguments, "
                "or a mapping of keyword arguments"
            )
            raise ExampleError(
                f"{type(model).__name__} does not run on the example ({type(error).__name__}: "
                f"{first_line(error)}): {remedy}"
            ) from error
    analysis = Analysis(search.recording, output, search.sites, search.functions, search.sums)
    return search.result(analysis), analysis, list(search.rejections.rejected.values())


class _Search:
    """Judges every addition of a forward pass while it is recorded."""

    def __init__(self, recording: Recording, training: bool) -> None:
        self.recording, self.training = recording, training
        self.found: dict[Key, list[tuple[Addition, Execution]]] = {}
        """The executions of each residual addition, and what each shows of it."""
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
        self.couplings: dict[int, tuple[Addition, Execution, Rejected]] = {}
        """By result: additions to one stream that are residual only if the other stream is added
        to as well, and the rejection if it is not."""
        self.shortcuts = Shortcuts(recording, self.sums)
        self.rejections = Rejections(recording)

    def result(self, analysis: Analysis) -> list[Addition]:
        """All residual additions, after the pass."""
        for _, _, rejected in self.couplings.values():
            self.rejections.add(rejected)
        return [self._merged(seen, analysis) for seen in self.found.values()]

    def _merged(self, seen: Sequence[tuple[Addition, Execution]], analysis: Analysis) -> Addition:
        """One addition, from all of its executions."""
        additions, executions = zip(*seen, strict=True)
        first = additions[0]
        return replace(
            first,
            edits=with_not_shown(
                as_sums(self.recording, first.edits, executions), self.occurrences
            ),
            begins_elsewhere=any(each.begins_elsewhere for each in additions),
            modules=tuple(name for each in additions for name in each.modules),
            parameters=frozenset[str]().union(*(each.parameters for each in additions)),
            upsamples=any(each.upsamples for each in additions),
            events=tuple(map(analysis.event, executions)),
            is_last=not any(self._is_mixed_later(each.total) for each in executions),
        )

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
            side = self.shortcuts.side(branch, operand, call)
            if side is None:
                side = self.shortcuts.part(branch, operand, call)
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
        side = self.shortcuts.side(left, right, call)
        reason = self.rejections.why_not(left, right, side, call)
        part = self.shortcuts.part(left, right, call) if side is None else None
        if scales_right and self._is_shortcut_of(left, right, call):
            self.rejections.add(self.rejections.rejection(frame, SCALED))
            return
        if function := function_around(frame):
            reason = own_backward(function)
            self.functions[call_site_of(frame)] = function
        if side is not None and not reason and (left, right)[side] not in repeated:
            identity = self.shortcuts.identity(left, right, call) is not None
            self._accept(*self._located(left, right, side, identity, total, frame))
        elif part is not None and not function:
            addition, made = self._located(left, right, part, True, total, frame)
            if not self._completes_coupling(addition, made):
                rejected = self.rejections.rejection(frame, COUPLING)
                self.couplings[total] = addition, made, rejected
        else:
            self.rejections.reject(frame, [left, right], reason or REPEATED)

    def _located(
        self, left: int, right: int, side: Side, identity: bool, total: int, frame: FrameType
    ) -> tuple[Addition, Execution]:
        """The addition of `left` and `right`, and this execution of it."""
        operands = left, right
        site = call_site_of(frame)
        occurrence = Occurrence(site, self.occurrences[site] - 1, side, self.training)
        stack = tuple(self.recording.calls)
        compiled = is_called_by_compiled(frame)
        made = Execution(
            operands[side], operands[1 - side], total, occurrence, stack, identity, compiled
        )
        return locate(self.recording, made, frame)

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

    def _completes_coupling(self, addition: Addition, new: Execution) -> bool:
        """Record a coupling and an earlier one, if each adds to the stream of the other."""
        for total, (before, old, _) in self.couplings.items():
            reaches_old = old.shortcut in self.recording.reach(new.added)
            if reaches_old and new.shortcut in self.recording.reach(old.added):
                del self.couplings[total]
                self._accept(before, old)
                self._accept(addition, new)
                return True
        return False

    def _accept(self, addition: Addition, made: Execution) -> None:
        """Record a residual addition, and earlier couplings that are residual because of it."""
        for total in [total for total in self.couplings if total in made.branch_in_owner]:
            coupling, old, _ = self.couplings[total]
            if made.shortcut in self.recording.reach(old.added):
                del self.couplings[total]
                self._accept(replace(coupling, coupled=made.total), old)
        self.found.setdefault((addition.owner, addition.edits), []).append((addition, made))
        self.sums.add(made.total)

    def _is_mixed_later(self, value: int) -> bool:
        """Whether any function with weights uses a value, or anything that is computed from it."""
        seen, ahead = {value}, [value]
        while ahead:
            for child in self.recording.values[ahead.pop()].children:
                if is_mixing(self.recording.values[child].made_by):
                    return True
                if child not in seen:
                    seen.add(child)
                    ahead.append(child)
        return False
