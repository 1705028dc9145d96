"""What dropping blocks is expected to save, counted on the network of a configuration."""

import statistics
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from stochastic_depth.errors import ApplyError
from stochastic_depth.surgery import summary
from stochastic_depth.train import Config, SurvivalConfig
from stochastic_depth.train.build import apply_survival, build_model
from stochastic_depth.train.config import ModelConfig
from stochastic_depth.train.schedule_config import ScheduleConfig


@dataclass(frozen=True)
class ExpectedCost:
    """What dropping blocks is expected to save, as the mean over training steps."""

    survival: tuple[float, ...]
    """(p_1, ..., p_L); under a schedule, their means over the steps."""
    saving: float
    """The share of the training FLOPs that dropped blocks save."""


def expected_cost(
    config: Config,
    shape: tuple[int, int, int],
    classes: int,
    steps_per_epoch: int,
    steps: int | None = None,
) -> ExpectedCost:
    """The expected cost of a configuration, counted on its network.

    Args:
        shape: the shape of an image, (channels, height, width).
        steps: how many training steps have been taken; all of the training when not given.

    Raises:
        ApplyError: when the rule is constant depth, which drops nothing.
    """
    full = _cost_at_full_rates(config.model, config.survival, shape, classes)
    whole = config.epochs * steps_per_epoch
    schedule = config.survival.schedule.of(whole)
    if schedule is None:
        return full
    taken = range(0, steps or whole, max(1, (steps or whole) // 1000))
    mean = statistics.fmean(map(schedule, taken))
    return ExpectedCost(tuple(1 - mean * (1 - p) for p in full.survival), mean * full.saving)


@lru_cache
def _cost_at_full_rates(
    model: ModelConfig, survival: SurvivalConfig, shape: tuple[int, int, int], classes: int
) -> ExpectedCost:
    network = build_model(model, shape[0], classes, 0)
    handle = apply_survival(network, replace(survival, schedule=ScheduleConfig()), 0, 1)
    if handle is None:
        raise ApplyError("constant depth drops no block, so that it saves nothing")
    masks = survival.gate == "sample"  # computes every branch
    saving = 0.0 if masks else summary(network, torch.zeros(2, *shape)).expected_saving
    return ExpectedCost(handle.survival, saving)
