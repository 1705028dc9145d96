"""Choose the engine that takes the training steps of a configuration, and say why."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from stochastic_depth.block_program.library import why_unavailable, why_unmeasured
from stochastic_depth.block_program.program import why_unsupported
from stochastic_depth.data.sources import SOURCES
from stochastic_depth.distributed.world import world_size
from stochastic_depth.errors import ConfigError
from stochastic_depth.models import DenseNet
from stochastic_depth.models.networks import NETWORKS
from stochastic_depth.train.config import Config

EngineName = Literal["eager", "compiled", "program"]
KernelsName = Literal["reference", "native", "compiled"]


class EngineChoice(NamedTuple):
    """The chosen engine and kernels, and the reason."""

    engine: EngineName
    kernels: KernelsName
    because: str


def choose_engine(config: Config, device: str, precision: str) -> EngineChoice:
    """The engine of a configuration.

    Raises:
        ConfigError: when the requested engine cannot train this network.
    """
    on_cpu = torch.device(device).type == "cpu"
    obstacle = _why_program_unsupported(config)
    if config.engine == "auto":
        why_not = obstacle or _why_little_gain(config, on_cpu, precision)
        if why_not is not None:
            return EngineChoice("eager", "reference", why_not)
        return EngineChoice("program", "native", "there are native kernels for this processor")
    if config.engine == "program":
        if obstacle is not None:
            raise ConfigError(f"engine is program: {obstacle}; use --engine eager")
        kernels = "compiled" if not on_cpu else "reference" if why_unavailable() else "native"
        return EngineChoice("program", kernels, "as asked")
    if config.engine == "compiled":
        _require_compilable(config)
    return EngineChoice(config.engine, "reference", "as asked")


def _require_compilable(config: Config) -> None:
    if NETWORKS[config.model.kind] is DenseNet:
        raise ConfigError(
            "engine is compiled: a densenet has no residual blocks, which are all that is "
            "compiled; use --engine eager"
        )
    if config.distributed.sync_batchnorm:
        raise ConfigError(
            "engine is compiled: PyTorch's compiler cannot compile blocks that wait for other "
            "processes; use --engine eager, or leave out --distributed.sync-batchnorm"
        )


def on_one_engine(configs: Sequence[Config]) -> list[Config]:
    """The configurations, with `eager` in place of `auto` if the program cannot train all of them.

    Their seconds can then be compared. The result is the same on every machine.
    """
    if not any(map(_why_program_unsupported, configs)):
        return list(configs)
    return [replace(one, engine="eager") if one.engine == "auto" else one for one in configs]


def _why_little_gain(config: Config, on_cpu: bool, precision: str) -> str | None:
    """Why the block program is not known to be faster here; None if it is."""
    if not on_cpu:
        return "the block program has not been measured on a GPU"
    reason = why_unavailable() or why_unmeasured()
    if reason is None and precision == "float32":
        reason = _why_images_unsupported(config)
    return reason and f"the block program gains little here: {reason}"


def _why_images_unsupported(config: Config) -> str | None:
    """Why the native kernels cannot take images of this size; None if they can.

    In float32 they compute at least 8 pixels of a row at a time in the first stage, and 2 in the
    last one, which has a quarter of the columns.
    """
    side = config.data.size or SOURCES[config.data.name].side
    if side % 8:
        return f"its kernels need images with a multiple of 8 pixels a side, these have {side}"
    return None


def _why_program_unsupported(config: Config) -> str | None:
    """Why the block program cannot train this configuration; None if it can."""
    if world_size() > 1:
        return f"the block program supports one process, {world_size()} are training"
    network, survival = NETWORKS[config.model.kind], config.survival
    if survival.rule == "constant":
        return why_unsupported(network)
    return why_unsupported(network, survival.gate, survival.closed)
