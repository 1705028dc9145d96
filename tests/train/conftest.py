"""Runs of a second: an eight-layer network on the embedded digits."""

from dataclasses import replace
from pathlib import Path

import pytest

from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import Config, DataConfig, ModelConfig, SurvivalConfig, begin, fit
from stochastic_depth.train.display import Silent
from support.runs import SILENT


class Remembering(Silent):
    """A `Callback` that remembers what it was told."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def silent():
    return Remembering()


@pytest.fixture(scope="session")
def small() -> Config:
    digits = RECIPES["digits"]()
    return replace(
        digits,
        data=DataConfig(train=320),
        model=ModelConfig(depth=14),
        optimizer=replace(digits.optimizer, batch=32),
        survival=SurvivalConfig(final=0.3),
        epochs=2,
        evaluate_every=4,
    )


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def finished(small, tmp_path_factory) -> Path:
    """A run that has ended, to be copied."""
    path = tmp_path_factory.mktemp("finished") / "run"
    run, images = begin(small, path)
    assert list(fit(run, images, SILENT))
    return path
