"""Record a pass in training mode, and match its residual additions with those of evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stochastic_depth.errors import StochasticDepthError
from stochastic_depth.surgery.blocks import FoundBlock
from stochastic_depth.surgery.droppath import disable_drop_paths
from stochastic_depth.surgery.find.groups import group_of
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.record.additions import discover
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import AdditionEvent, Analysis, Occurrence
from stochastic_depth.surgery.record.rejected import Rejected


@dataclass(frozen=True)
class InTraining:
    """The results of a recorded pass in training mode."""

    additions: list[Addition]
    """All residual additions of the pass in training mode."""
    new: tuple[AdditionEvent, ...]
    """The events that do not happen in evaluation."""
    counterparts: Mapping[Occurrence, AdditionEvent]
    """For each event of evaluation, the same event in training mode."""
    analysis: Analysis
    rejected: list[Rejected]


def added_in_training(
    model: nn.Module,
    run: Callable[[], Any],
    found: Sequence[FoundBlock],
    additions: Sequence[Addition],
    analysis: Analysis,
    count_flops: bool,
) -> InTraining | None:
    """Record a pass in training mode; returns None if it cannot differ from evaluation.

    It differs if training mode makes more additions. It may also differ if evaluation does not use
    everything that a module of a deferred branch returns, because a loss may use the rest.

    Args:
        additions: the additions of evaluation; `analysis` belongs to the same pass.
    """
    changed_settings = disable_drop_paths(model, found)
    try:
        with preserve_state(model), torch.enable_grad():
            model.train()
            now, analysis_now, rejected = discover(
                model, run, count_flops=count_flops, gradients=True
            )
    except StochasticDepthError:  # the model cannot train on the example
        return None
    finally:
        for setting in changed_settings:
            setting.restore()
    adds_more = not analysis_now.sites <= analysis.sites or analysis_now.functions
    if not adds_more and not any(_gives_more(block, analysis) for block in found):
        return None
    new, counterparts = _matched(additions, analysis, now, analysis_now)
    return InTraining(now, tuple(new), counterparts, analysis_now, rejected)


def _gives_more(block: FoundBlock, analysis: Analysis) -> bool:
    """Whether a module of a deferred branch returns a value that nothing is computed from."""
    values = analysis.recording.values
    return block.is_deferred and any(
        all(c < call.ended or c not in analysis.alive for c in values[value].children)
        for name in block.modules
        for call in analysis.calls_of(name)
        for value in call.outputs
    )


def _matched(
    before: Sequence[Addition],
    analysis_before: Analysis,
    now: Sequence[Addition],
    analysis_now: Analysis,
) -> tuple[list[AdditionEvent], dict[Occurrence, AdditionEvent]]:
    """Match the events of the two passes.

    Two events are the same if the same expression makes them in the same module, and their branches
    share a parameter, or call the same modules.

    Returns:
        The events of `now` that are not in `before`; and for each event of `before` that is in
        `now`, its counterpart.
    """
    left: dict[object, list[tuple[AdditionEvent, frozenset[str]]]] = {}
    for event in (event for addition in before for event in addition.events):
        left.setdefault(_expression(event), []).append((event, _runs(event, analysis_before)))
    known = {key: [runs for _, runs in each] for key, each in left.items()}
    new: list[AdditionEvent] = []
    counterparts: dict[Occurrence, AdditionEvent] = {}
    for event in (event for addition in now for event in addition.events):
        key, runs = _expression(event), _runs(event, analysis_now)
        if not _is_known(runs, known.get(key, ())):
            new.append(event)
            continue
        same = (n for n, (_, its) in enumerate(left[key]) if _is_known(runs, [its]))
        if (n := next(same, None)) is not None:
            counterparts[left[key].pop(n)[0].occurrence] = event
    return new, counterparts


def _expression(event: AdditionEvent) -> object:
    """A key for the expression and the module that make an addition."""
    return event.site, event.stack[-1].name


def _runs(event: AdditionEvent, analysis: Analysis) -> frozenset[str]:
    """Names of the parameters that its branch uses; if it uses none, names of its modules."""
    parameters = analysis.recording.parameters(event.branch)
    return parameters or frozenset(group_of("", [event], analysis).modules)


def _is_known(runs: frozenset[str], known: Iterable[frozenset[str]]) -> bool:
    """Whether a branch is one of those that the same expression adds in evaluation."""
    return any(runs == before or not runs.isdisjoint(before) for before in known)
