"""Runs of a few seconds, for all that looks into trained networks."""

from dataclasses import replace

import pytest
from rich.console import Console

from stochastic_depth.analysis import train_pairs
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig, OptimizerConfig
from stochastic_depth.train.display import Display


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """ResNet-14, constant and stochastic depth, one seed: {"constant": [Run], ...}."""
    config = replace(
        RECIPES["digits"](),
        model=ModelConfig(depth=14),
        optimizer=OptimizerConfig(batch=64),
        epochs=4,
        engine="eager",
    )
    display = Display(Console(quiet=True), quiet=True)
    return train_pairs(config, [0], tmp_path_factory.mktemp("trained"), display, lambda: None)


@pytest.fixture
def silent():
    """Progress that nobody sees."""
    return lambda doing, done, total: None
