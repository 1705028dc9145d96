"""What a network with stochastic depth should cost, from its gates and its FLOPs."""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from stochastic_depth.errors import ApplyError
from stochastic_depth.surgery import summary
from stochastic_depth.train.build import build_depth, build_model
from stochastic_depth.train.config import ModelConfig, SurvivalConfig


@dataclass(frozen=True)
class ExpectedCost:
    """Of a training step, once a ramp is over."""

    survival: tuple[float, ...]
    """(p_1, ..., p_L)."""
    saving: float
    """The share of the training FLOPs in dropped blocks."""


@lru_cache
def expected_cost(
    model: ModelConfig, survival: SurvivalConfig, shape: tuple[int, int, int], classes: int
) -> ExpectedCost:
    """Counted on the network itself, for images of `shape` (channels, height, width).

    Raises:
        ApplyError: when the rule is constant depth, which drops nothing.
    """
    network = build_model(model, shape[0], classes, 0)
    handle = build_depth(network, replace(survival, ramp_epochs=0.0), 0, 1)
    if handle is None:
        raise ApplyError("constant depth drops no block, so that it saves nothing")
    masks = survival.gate == "sample"  # computes every branch
    saving = 0.0 if masks else summary(network, torch.zeros(2, *shape)).expected_saving
    return ExpectedCost(handle.survival, saving)
