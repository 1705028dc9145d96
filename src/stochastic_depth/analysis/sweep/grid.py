"""The points of a sweep: which survival rule, at which p_L, at which depth, from which seed."""

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from stochastic_depth.errors import ConfigError
from stochastic_depth.train import Config
from stochastic_depth.train.build import build_depth, build_model

Rule = Literal["linear", "uniform", "constant"]


@dataclass(frozen=True)
class Point:
    """One run of a sweep, as what it changes in the sweep's configuration."""

    rule: Rule
    survival: float | None
    """p_L; None at constant depth."""
    depth: int
    seed: int

    @property
    def name(self) -> str:
        """Of the run folder."""
        survival = "" if self.survival is None else f"-{self.survival}"
        return f"{self.rule}{survival}-depth{self.depth}-seed{self.seed}"

    def of(self, config: Config) -> Config:
        """The configuration of this run."""
        survival = replace(config.survival, rule=self.rule)
        if self.survival is not None:
            survival = replace(survival, final=self.survival)
        model = replace(config.model, depth=self.depth)
        return replace(config, survival=survival, model=model, seed=self.seed)


@dataclass(frozen=True)
class Grid:
    """Every rule at every p_L, and constant depth once, at every depth, from every seed."""

    rules: tuple[Rule, ...]
    survival: tuple[float, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values:
                raise ConfigError(f"the grid has no {name}: give at least one value")
            if len(set(values)) < len(values):
                raise ConfigError(f"the grid's {name} are {list(values)}: give each value once")

    def points(self) -> list[Point]:
        """Seed by seed, so that a sweep that is stopped early has whole curves of some seeds."""
        return [
            Point(rule, survival, depth, seed)
            for seed, depth, rule in product(self.seeds, self.depths, self.rules)
            for survival in ((None,) if rule == "constant" else self.survival)
        ]

    def check(self, config: Config) -> None:
        """Refuse a grid with a run that could not be trained, before any is.

        Raises:
            ApplyError: when the network has no residual blocks.
            ConfigError: naming the value.
        """
        for point in self.points():
            point.of(config)
        for depth in self.depths:
            with torch.device("meta"):
                model = build_model(replace(config.model, depth=depth), 3, 10, 0)
            if self.rules != ("constant",):
                build_depth(model, replace(config.survival, rule="linear"), 0, 1)

    def to_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}
