"""What analyses can be told."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.trained import TrainedNetwork, trained
from stochastic_depth.train import Run, open_run


@dataclass(frozen=True)
class Analysis(ABC):
    """One question about finished or unfinished runs."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN...", help_behavior_hint=""),
    ]
    """The run folders; those that differ in their seed alone are taken together."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no RUN is given: name one run folder or several")

    def opened(self) -> list[Run]:
        """The runs, for their journals."""
        return [open_run(path) for path in self.runs]

    @abstractmethod
    def analyse(self, console: Console) -> None:
        """Find out and print."""


@dataclass(frozen=True)
class NetworkAnalysis(Analysis):
    """One that runs the trained networks."""

    checkpoint: Literal["best", "last"] = "best"
    """The checkpoint of the lowest validation error, or the newest."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where their data is now (none: where it was)."""
    again: bool = False
    """Measure again what was measured before with the same settings."""

    def networks(self) -> Iterator[TrainedNetwork]:
        """The trained networks, one at a time."""
        for path in self.runs:
            yield trained(path, self.data, self.checkpoint)
