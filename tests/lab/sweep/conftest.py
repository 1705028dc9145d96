"""Sweeps of seconds."""

import pytest
from small_sweep import GRID, SMALL

from stochastic_depth.lab.sweep.folder import open_sweep


@pytest.fixture
def sweep(tmp_path):
    """Six runs of six steps."""
    return open_sweep(tmp_path / "sweep", "survival", GRID, SMALL)
