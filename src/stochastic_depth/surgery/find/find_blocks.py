"""Find the residual blocks of any model, and the mechanism by which each is made skippable.

The blocks of a pass in evaluation mode come first (`form_blocks`), then what training mode adds to
them (`training_additions`, `training_blocks`).
"""

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stochastic_depth.choices import Granularity
from stochastic_depth.errors import ExampleError
from stochastic_depth.hooks import refuse_cache
from stochastic_depth.residual import Residual
from stochastic_depth.surgery.blocks import FoundBlock, nothing_found, residual_block
from stochastic_depth.surgery.example import NEED_GRADIENTS, Example, caller
from stochastic_depth.surgery.find.branch_parameters import (
    NamedRoutes,
    attribute_parameters,
    attribute_parameters_of_units,
    routes_of_gradients,
    routes_of_units,
)
from stochastic_depth.surgery.find.form_blocks import BlockSettings, form_blocks
from stochastic_depth.surgery.find.training_additions import added_in_training
from stochastic_depth.surgery.find.training_blocks import with_training
from stochastic_depth.surgery.model_state import preserve_state
from stochastic_depth.surgery.record.additions import discover
from stochastic_depth.surgery.record.branch_source import Addition
from stochastic_depth.surgery.record.branches import Analysis
from stochastic_depth.surgery.record.rejected import Rejected, listed
from stochastic_depth.surgery.select_modules import SelectedModules


@dataclass(frozen=True)
class Found:
    """The residual blocks that were found in a model."""

    blocks: list[FoundBlock]
    """Its residual blocks, in the order in which they run on the example, if there is one."""
    rejected: list[Rejected]
    """Additions that form no block."""
    routes: NamedRoutes


def find_residuals(model: nn.Module, selected: SelectedModules) -> Found:
    """Find the `Residual` units of `model`, in order of registration.

    Raises:
        ApplyError: when there are none.
    """
    blocks = [
        residual_block(name, module, 0)
        for name, module in model.named_modules()
        if isinstance(module, Residual)
    ]
    blocks = [each for each in blocks if selected.allows(each.name, each.names_in_branch())]
    if not blocks:
        raise nothing_found(model, None)
    blocks = attribute_parameters_of_units(blocks, model)
    return Found(blocks, [], routes_of_units(blocks, model))


def find_blocks(
    model: nn.Module,
    example: Example,
    granularity: Granularity,
    selected: SelectedModules,
    *,
    defer: Container[str],
    count_flops: bool,
) -> Found:
    """Find the residual blocks of `model`.

    Args:
        defer: names of blocks to defer even if their source can be rewritten.

    Raises:
        ApplyError: when there are none.
    """
    settings = BlockSettings(dict(model.named_modules()), selected, granularity, defer)
    run = caller(model, example)
    additions, analysis, not_residual = _added_in_evaluation(model, run, count_flops)
    pairs, no_blocks = form_blocks(additions, analysis, settings)
    pairs = attribute_parameters(pairs, model, analysis)
    found = [block for block, _ in pairs]
    rejected = [*not_residual, *no_blocks]
    if any(block.refusal for block in found):
        refuse_cache(analysis.output)  # filling the cache may be all that needs the branches
    training = added_in_training(model, run, found, additions, analysis, count_flops)
    if training is not None:
        found, later = with_training(pairs, analysis, training, settings)
        known = {(each.owner, each.location) for each in rejected}
        rejected += [each for each in later if (each.owner, each.location) not in known]
    if not found:
        raise nothing_found(model, example, listed(rejected))
    return Found(found, rejected, routes_of_gradients(pairs, found, analysis))


def _added_in_evaluation(
    model: nn.Module, run: Callable[[], Any], count_flops: bool
) -> tuple[list[Addition], Analysis, list[Rejected]]:
    """What `discover` returns of a pass in evaluation; with gradients where there must be some."""

    def discovered(run: Callable[[], Any]) -> tuple[list[Addition], Analysis, list[Rejected]]:
        with preserve_state(model):
            model.eval()
            return discover(model, run, count_flops=count_flops, gradients=False)

    try:
        return discovered(run)
    except ExampleError as error:
        if "grad" not in str(error.__cause__):
            raise
    found = discovered(torch.enable_grad()(run))
    NEED_GRADIENTS.add(model)
    return found
