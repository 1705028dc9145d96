"""The cost of each gating is measured on images like those that the runs were trained on."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from stochastic_depth.lab.sweep.folder import Grid, open_sweep
from stochastic_depth.lab.sweep.gates import gating_results
from stochastic_depth.lab.sweep.workers import train_point
from stochastic_depth.train import Config, DataConfig, ModelConfig, OptimizerConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_gatings_of_own_pictures_are_compared_whatever_their_size(tmp_path):
    for part in ("train", "val"):
        for name in ("dark", "middle", "bright"):
            (folder := tmp_path / "data" / part / name).mkdir(parents=True)
            for n in range(2):
                pixels = np.full((32, 32, 3), 80 * n + 50, np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    config = Config(
        data=DataConfig("folder", tmp_path / "data"),  # without a size: that of ImageNet
        model=ModelConfig(depth=8),
        optimizer=OptimizerConfig(batch=6),
        epochs=1,
        precision="float32",
    )
    grid = Grid(("linear",), (0.5,), (8,), (0,), ("constant", "batch"))
    sweep = open_sweep(tmp_path / "sweep", "gates", grid, config)
    for point in grid.points():
        train_point(sweep, point, lambda: None)
    found = gating_results(sweep, Console(quiet=True), repeats=1)
    assert list(found["gatings"]) == ["constant", "batch"]
    # Two multiply-adds for each of 27 weights, 16 channels and 6 images of 224x224 in the stem
    # alone, forward and backward.
    assert found["gatings"]["constant"]["step"]["flops"] > 2 * 2 * 27 * 16 * 6 * 224**2
