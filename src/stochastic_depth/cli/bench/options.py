"""What every benchmark can be told."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from stochastic_depth.errors import ConfigError
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Options(ABC):
    """One benchmark, and how to compute in it."""

    repeats: int = 20
    """Rounds, each of one step of every alternative."""
    device: str = "auto"
    """cpu or cuda (auto: a GPU if there is one)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of convolutions and products."""
    engine: Literal["auto", "eager", "compiled", "graphs"] = "auto"
    """Of our own training steps, as for train; all others are by autograd."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result as JSON here."""

    def __post_init__(self) -> None:
        if self.repeats < 2:
            raise ConfigError(f"repeats={self.repeats}: quartiles need at least 2 rounds")

    @abstractmethod
    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        """Measure and print; gives what is written as JSON."""


@dataclass(frozen=True)
class OfResNet(Options):
    """A benchmark of training steps of one CIFAR ResNet."""

    depth: int = 110
    """Of the CIFAR ResNet."""
    batch: int = 128
    """Images a step."""
    size: int = 32
    """Height and width of the images, pixels."""
