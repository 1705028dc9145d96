"""Additions that a model makes in training mode only: they belong to the block that adds otherwise.

A block may add in another expression in training mode than in evaluation (`if self.training:`). It
has one gate all the same, which must close both.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from stochastic_depth.errors import UnsupportedBlockError
from stochastic_depth.surgery.additions import Addition, Passed, discover
from stochastic_depth.surgery.blocks import Found, Unit, repeated_block
from stochastic_depth.surgery.branches import Analysis, Event, Group
from stochastic_depth.surgery.droppath import silence
from stochastic_depth.surgery.edits import ADDITIONS, Deferred, Site, site_of
from stochastic_depth.surgery.preserve import preserve_state

Cut = Callable[[Addition], Unit]
"""Rewrites the methods that make an addition; raises `UnsupportedBlockError` where it cannot."""


def added_in_training(
    model: nn.Module, run: Callable[[], Any], found: Sequence[Found], known: frozenset[Site]
) -> tuple[list[Addition], Analysis] | None:
    """The additions that are made in training mode only; None where there are none.

    Args:
        known: the expressions that add in evaluation.
    """
    silenced = silence(model, found)
    try:
        with preserve_state(model), torch.enable_grad():
            model.train()
            try:
                with _Sites() as sites:
                    run()
            except Exception:  # the example is not one to train on
                return None
            if sites.seen <= known:
                return None
            additions, analysis = discover(model, run, gradients=True)
    finally:
        for each in silenced:
            each.restore()
    new = [a for a in additions if not known.issuperset(event.site for event in a.events)]
    return new, analysis


class _Sites(TorchFunctionMode):
    """While entered, notes the expressions that add."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Site] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ADDITIONS:
            self.seen.add(site_of(sys._getframe(1)))
        return func(*args, **(kwargs or {}))


def joined(
    found: Sequence[Found],
    additions: Sequence[tuple[str, Addition]],
    analysis: Analysis,
    modules: Mapping[str, nn.Module],
    cut: Cut,
    passed: list[Passed],
) -> list[Found]:
    """`found`, each with what it adds in training mode only.

    Args:
        additions: with the name of the block that each belongs to.
        passed: gets the additions of modules that have no block in evaluation.
    """
    blocks = list(found)
    put_off: list[Addition] = []
    for name in dict.fromkeys(name for name, _ in additions):
        own = [addition for of, addition in additions if of == name]
        numbers = [n for n, block in enumerate(blocks) if block.name == name]
        if not numbers or any(blocks[n].mechanism == "deferred" for n in numbers):
            put_off += own
            continue
        if len(numbers) == 1:
            blocks[numbers[0]] = _with(blocks[numbers[0]], own, cut)
            continue
        for n, addition in zip(numbers, own, strict=False):
            blocks[n] = _with(blocks[n], [addition], cut)
        if len(own) != len(numbers):
            blocks[numbers[-1]] = replace(blocks[numbers[-1]], refusal=_UNLIKE)
    of_event = {event: addition for addition in put_off for event in addition.events}
    for group in analysis.blocks(of_event, lambda name: repeated_block(name, modules)):
        numbers = [n for n, block in enumerate(blocks) if block.name == group.block]
        for n in numbers[:1]:
            blocks[n] = _put_off_too(blocks[n], group, analysis, modules)
        if not numbers:
            alone = dict.fromkeys(of_event[event] for event in group.events)
            passed += [
                Passed(a.owner, str(a.edits[0][1] or "in a function"), _ALONE) for a in alone
            ]
    return blocks


_ALONE = "it is made in training mode only: no block of evaluation belongs to it"
_UNLIKE = (
    "in training mode its module makes another number of residual additions than in evaluation: "
    'granularity="block" gives all of them one gate'
)


def _with(block: Found, additions: Sequence[Addition], cut: Cut) -> Found:
    """A block whose methods are rewritten at `additions` too."""
    if block.refusal or block.mechanism in ("registered", "opaque", "Residual"):
        return block
    try:
        units = (*block.units, *map(cut, additions))
    except UnsupportedBlockError as error:
        return replace(block, refusal=f"in training mode it adds in another way: {error}")
    called = Counter(name for addition in additions for name in addition.modules)
    return replace(block, units=units, modules=block.modules | called)


def _put_off_too(
    block: Found, group: Group, analysis: Analysis, modules: Mapping[str, nn.Module]
) -> Found:
    """A deferred block that knows its additions in training mode too."""
    if block.refusal:
        return block
    units = list(block.units)
    try:
        edits = analysis.edits(group, False, 0)
        for event, edit in zip(group.events, edits, strict=True):
            names = {calls.module for calls in edit.calls}
            n = max(range(len(units)), key=lambda n: len(names & _names(units[n])))
            if modules[group.owner.name] is not units[n].edits[0][0] or not names & _names(
                units[n]
            ):
                raise UnsupportedBlockError("other modules run for its branch than in evaluation")
            units[n] = _joined(units[n], event, edit)
    except UnsupportedBlockError as error:
        return replace(block, refusal=f"in training mode it adds in another way: {error}")
    return replace(block, units=tuple(units), modules=block.modules | group.modules)


def _joined(unit: Unit, event: Event, edit: Deferred) -> Unit:
    """A deferred unit whose addition stands elsewhere in training mode."""
    owner, before = unit.edits[0]
    assert isinstance(before, Deferred)
    calls = {each.module: each for each in before.calls}
    for each in edit.calls:
        known = calls.setdefault(each.module, each)
        if known != each and not (known.always and each.always):
            raise UnsupportedBlockError(
                f"{each.module!r} is called more or less often than in evaluation"
            )
    sites = tuple(dict.fromkeys((*before.sites, *edit.sites)))
    after = replace(before, sites=sites, calls=tuple(calls.values()))
    return replace(unit, edits=((owner, after),), events=(*unit.events, event))


def _names(unit: Unit) -> set[str]:
    _, edit = unit.edits[0]
    assert isinstance(edit, Deferred)
    return {calls.module for calls in edit.calls}
