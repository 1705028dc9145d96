"""Sweeps of seconds."""

import pytest

from stochastic_depth.lab.sweep.folder import open_sweep
from support.small_sweep import GRID, SMALL


@pytest.fixture
def sweep(tmp_path):
    """Six runs of six steps."""
    return open_sweep(tmp_path / "sweep", "survival", GRID, SMALL)
