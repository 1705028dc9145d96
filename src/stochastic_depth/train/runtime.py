"""Where and how a run computes: device, precision, threads and engine."""

import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

import torch

from stochastic_depth.block_program.library import cpu_capabilities
from stochastic_depth.distributed.world import world_size
from stochastic_depth.errors import ConfigError, first_line
from stochastic_depth.train.config import Config
from stochastic_depth.train.engine_choice import EngineName, KernelsName, choose_engine


@dataclass(frozen=True)
class Runtime:
    """Device, precision, threads and engine of a run, after `auto` was resolved.

    Convolutions always run on channels_last tensors.
    """

    device: str
    precision: Literal["float32", "bfloat16"]
    threads: int
    engine: EngineName = "eager"
    """How a training step is taken."""
    kernels: KernelsName = "reference"
    """Kernels of the block program."""
    engine_because: str = "as asked"

    def __str__(self) -> str:
        """Device, precision and engine, and why this engine."""
        kernels = "" if self.kernels == "reference" else f", {self.kernels} kernels"
        return (
            f"{self.device} {self.precision}, engine {self.engine}{kernels}: {self.engine_because}"
        )

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def autocast(self) -> AbstractContextManager:
        """Computes convolutions and products in `precision`; the weights stay in float32."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bfloat16")

    def synchronise(self) -> None:
        """Wait until the device has finished all queued work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def resolve_runtime(config: Config) -> Runtime:
    """Choose the device, the precision and the engine.

    Raises:
        ConfigError: when there is no such device, or the engine cannot train this network.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = usable_device(device)
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if has_bfloat16(device) else "float32"
    choice = choose_engine(config, device, precision)
    return Runtime(device, precision, torch.get_num_threads(), *choice)


def usable_device(device: str) -> str:
    """`device`, by the name that checkpoints are loaded with.

    Raises:
        ConfigError: when there is no such device, or it cannot train.
    """
    here = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}, which cannot train: choose from {here}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {device!r}, which cannot be used ({first_line(error)}): choose from {here}"
        ) from error
    # PyTorch cannot load a checkpoint onto cpu:0.
    return "cpu" if torch.device(device).type == "cpu" else device


def has_bfloat16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware, which makes it faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    processor = cpu_capabilities()
    return bool(processor.get("avx512_bf16") or processor.get("amx_bf16"))


def machine(runtime: Runtime) -> dict[str, str | int]:
    """A description of this machine, for results that are measured on it."""
    described: dict[str, str | int] = {
        "system": platform.platform(),
        "processor": str(cpu_capabilities().get("cpu_name", platform.processor())),
        "threads": runtime.threads,
        "processes": world_size(),
    }
    if runtime.on_gpu:
        described["gpu"] = torch.cuda.get_device_name(runtime.device)
    return described


def timing_conditions(runtime: Runtime, machine: Mapping[str, str | int]) -> dict[str, str]:
    """What the seconds of a training depend on, by name, as text.

    Args:
        machine: as `machine` describes it; runs begun before 2026-12-01 have not recorded the
            number of processes, which is then left out.
    """
    counts = {name: str(machine[name]) for name in ("threads", "processes") if name in machine}
    return {
        **counts,
        "machine": ", ".join(str(value) for name, value in machine.items() if name not in counts),
        "engine": f"{runtime.engine}, {runtime.kernels} kernels",
        "precision": runtime.precision,
    }


def versions() -> dict[str, str]:
    """Versions of this package, of PyTorch and of Python."""
    packages = {name: version(name) for name in ("stochastic-depth", "torch")}
    return {**packages, "python": platform.python_version()}
