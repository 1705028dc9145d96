"""The points of a sweep, and the configuration of the run at each of them."""

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from stochastic_depth.choices import RuleName
from stochastic_depth.errors import ConfigError
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train import Config


@dataclass(frozen=True)
class Point:
    """One run of a sweep, given by what it changes in the configuration of the sweep."""

    rule: RuleName
    survival: float | None
    """p_L; None at constant depth."""
    depth: int
    seed: int
    gating: str | None = None
    """One of `recipes.paper.gatings`; None for the gating of the configuration."""

    @property
    def name(self) -> str:
        """The name of the run folder."""
        survival = "" if self.survival is None else f"-{self.survival}"
        gating = f"{self.gating}-" if self.gating else ""
        return f"{gating}{self.rule}{survival}-depth{self.depth}-seed{self.seed}"

    def of(self, config: Config) -> Config:
        """The configuration of this run."""
        if self.gating is not None:
            config = gatings(config)[self.gating]
        survival = replace(config.survival, rule=self.rule)
        if self.survival is not None:
            survival = replace(survival, final=self.survival)
        model = replace(config.model, depth=self.depth)
        return replace(config, survival=survival, model=model, seed=self.seed)


@dataclass(frozen=True)
class Grid:
    """Every rule at every p_L, and constant depth once, at every depth and from every seed."""

    rules: tuple[RuleName, ...]
    survival: tuple[float, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    gatings: tuple[str, ...] = ()
    """Names from `recipes.paper.gatings`, each of which replaces the configured gating."""

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if not values and name != "gatings":
                raise ConfigError(f"the grid has no {name}: give at least one value")
            if len(set(values)) < len(values):
                raise ConfigError(f"the grid's {name} are {list(values)}: give each value once")

    def points(self) -> list[Point]:
        """All points, seed by seed: a sweep that is stopped early has all curves of some seeds."""
        if self.gatings:
            return [
                Point("constant", None, depth, seed, gating)
                if gating == "constant"
                else Point(rule, survival, depth, seed, gating)
                for seed, depth, gating in product(self.seeds, self.depths, self.gatings)
                for rule, survival in product(self.rules, self.survival)
            ]
        return [
            Point(rule, survival, depth, seed)
            for seed, depth, rule in product(self.seeds, self.depths, self.rules)
            for survival in ((None,) if rule == "constant" else self.survival)
        ]

    def to_json(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items() if values}
