"""A recipe that differs from another in one thing."""

from dataclasses import replace

from stochastic_depth.train.config import Config


def constant_depth(config: Config) -> Config:
    """`config` without stochastic depth: every block in every step."""
    return replace(config, survival=replace(config.survival, rule="constant"))
