"""Build the network, its stochastic depth and its optimizer from a configuration."""

from itertools import count
from typing import Any

import torch
from torch import nn

from stochastic_depth.data import Batches
from stochastic_depth.distributed import synchronise_batchnorm
from stochastic_depth.distributed.world import world_size
from stochastic_depth.errors import ApplyError, ConfigError
from stochastic_depth.handle import Handle
from stochastic_depth.models import DenseNet, Network
from stochastic_depth.models.networks import NETWORKS
from stochastic_depth.residual import Residual
from stochastic_depth.surgery import apply, handle_of
from stochastic_depth.surgery.example import Example
from stochastic_depth.survival import LinearDecay, SurvivalRule, Uniform
from stochastic_depth.train.config import Config, ModelConfig, OptimizerConfig, SurvivalConfig
from stochastic_depth.train.runtime import Runtime


def architecture(
    config: ModelConfig, channels: int, classes: int
) -> tuple[type[Network], dict[str, Any]]:
    """The class of the network, and its arguments except those that set its initial weights."""
    arguments: dict[str, Any] = {"depth": config.depth, "classes": classes, "channels": channels}
    if config.kind == "densenet":
        arguments["growth"] = config.growth
        arguments["bottleneck"] = config.bottleneck
        arguments["compression"] = 0.5 if config.bottleneck else 1.0
    return NETWORKS[config.kind], arguments


def build_model(config: ModelConfig, channels: int, classes: int, seed: int) -> Network:
    """The network for images of `channels` channels; its weights are a function of `seed`."""
    kind, shape = architecture(config, channels, classes)
    if kind is not DenseNet:
        shape["init"] = config.init
    return kind(**shape, seed=seed)


def apply_survival(
    model: nn.Module,
    config: SurvivalConfig,
    seed: int,
    steps: int,
    example: Example | None = None,
) -> Handle | None:
    """Give `model` stochastic depth, unless the rule is constant depth.

    Args:
        steps: the number of steps of the training; a schedule is given in fractions of it.
        example: of the inputs; without it, the model must be built from `Residual` units.
    """
    if config.rule == "constant":
        return None
    rule: SurvivalRule = LinearDecay(config.final)
    if config.rule == "uniform":
        rule = Uniform(config.final)
    return apply(
        model,
        rule,
        schedule=config.schedule.of(steps),
        example=example,
        gate=config.gate,
        balance=config.balance,
        closed=config.closed,
        scale=config.scale,
        skipped=config.skipped,
        seed=seed,
    )


def handle_or_always_open(model: nn.Module) -> Handle:
    """The handle of `model`. A model of constant depth gets gates that are always open.

    Raises:
        ApplyError: when it has no residual blocks.
    """
    try:
        return handle_of(model)
    except ApplyError:
        _require_blocks(model, "choose a run of another network")
        return apply(model, Uniform(1.0))


def _require_blocks(model: nn.Module, remedy: str) -> None:
    """Raise an error for a network that is not built from residual blocks."""
    if not any(isinstance(module, Residual) for module in model.modules()):
        raise ApplyError(
            f"a {type(model).__name__} has no residual blocks that could be skipped: {remedy}"
        )


def build_network(
    config: Config, runtime: Runtime, batches: Batches
) -> tuple[nn.Module, Handle | None]:
    """The network of a configuration on its device; and its handle, if it has stochastic depth."""
    model = build_model(config.model, batches.shape[0], len(batches.classes), config.seed)
    model = model.to(device=runtime.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if world_size() > 1 and config.distributed.sync_batchnorm:
        model = synchronise_batchnorm(model)
    steps = config.epochs * batches.steps_per_epoch
    return model, apply_survival(model, config.survival, config.seed, steps)


def require_trainable(config: Config, batches: Batches) -> None:
    """Raise an error for a configuration that cannot be trained, before anything is written.

    No weights are allocated.

    Raises:
        ApplyError: when the network has no residual blocks to skip.
        ConfigError: when there is no such network, the images or a mini-batch are too small, or
            the schedule drops no block.
    """
    channels, height, width = batches.shape
    with torch.device("meta"):
        model = build_model(config.model, channels, len(batches.classes), config.seed)
    if config.survival.rule != "constant":
        _require_blocks(model, "give --survival.rule constant")
        config.survival.schedule.require_effect(config.epochs * batches.steps_per_epoch)
    if not model.takes(height, width):
        size = next(size for size in count(max(height, width)) if model.takes(size, size))
        raise ConfigError(
            f"the images have {height}x{width} pixels, which no {config.model.kind} takes: "
            f"give --data.size {size}, or leave it out"
        )
    images = images_in(batches.steps_per_epoch - 1, config, batches)
    if images // world_size() < 2:
        raise ConfigError(
            f"optimizer.batch is {config.optimizer.batch}: the last mini-batch of an epoch has "
            f"{images} images, and each of {world_size()} processes needs 2 of them (BatchNorm)"
        )


def images_in(step: int, config: Config, batches: Batches) -> int:
    """The number of images in the mini-batch of a step, over all processes."""
    batch = config.optimizer.batch
    return min(batch, batches.sizes["train"] - step % batches.steps_per_epoch * batch)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.SGD:
    """SGD with Nesterov momentum, or plain SGD for a momentum of 0.

    Weight decay is on every parameter, as in the authors' code.
    """
    return torch.optim.SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def first_convolution(model: nn.Module) -> nn.Parameter:
    """The weight of the first convolution, which is in no block and is therefore never skipped."""
    return _first_weight(model, nn.Conv2d)


def _first_weight(model: nn.Module, *kinds: type[nn.Module]) -> nn.Parameter:
    weight = next(m.weight for m in model.modules() if isinstance(m, kinds))
    assert isinstance(weight, nn.Parameter)
    return weight


def block_convolutions(model: nn.Module) -> list[nn.Parameter]:
    """The weight of the first convolution or linear layer in the branch of each block."""
    branches = [module.branch for module in model.modules() if isinstance(module, Residual)]
    return [_first_weight(branch, nn.Conv2d, nn.Linear) for branch in branches]


def learning_rate(config: OptimizerConfig, step: int, steps: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (from 0) in a run of `steps` steps.

    In the paper, section 4, it is 0.1, divided by 10 at 50 % and at 75 % of the run.
    """
    if step < round(config.warmup_epochs * steps_per_epoch):
        return config.warmup_rate
    passed = sum(step >= round(fraction * steps) for fraction in config.milestones)
    return config.learning_rate / config.divisor**passed
