import json
from dataclasses import replace
from pathlib import Path

import pytest

from stochastic_depth.errors import RunError, StochasticDepthError
from stochastic_depth.lab.sweep.folder import open_sweep, read_sweep
from stochastic_depth.train import DataConfig, ModelConfig, SurvivalConfig
from stochastic_depth.train.schedule_config import ScheduleConfig
from support.small_sweep import GRID, SMALL

BEYOND = ScheduleConfig("late", until=1e9)


def test_the_folder_tells_kind_grid_and_recipe(sweep):
    shown = json.loads((sweep.folder / "sweep.json").read_text())
    assert (shown["format"], shown["kind"], shown["recipe"]) == (1, "survival", "digits")
    assert shown["grid"] == {
        "rules": ["linear", "constant"],
        "survival": [0.3, 0.6],
        "depths": [8],
        "seeds": [0, 1],
    }
    assert shown["config"]["epochs"] == 2


def test_the_same_sweep_again_is_the_same(sweep):
    assert open_sweep(sweep.folder, "survival", GRID, SMALL) == sweep


def test_a_sweep_is_read_as_it_was_begun(sweep):
    assert read_sweep(sweep.folder) == replace(sweep, config=SMALL.without_io())


def test_what_does_not_change_results_may_be_another(sweep):
    config = replace(SMALL, keep=1, data=replace(SMALL.data, workers=0))
    assert open_sweep(sweep.folder, "survival", GRID, config).folder == sweep.folder


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"kind": "depth"}, "its kind is survival, not depth"),
        ({"grid": replace(GRID, seeds=(0, 1, 2))}, r"its grid.seeds is \[0, 1\], not \[0, 1, 2\]"),
        ({"config": replace(SMALL, epochs=3)}, "its config.epochs is 2, not 3"),
        ({"config": replace(SMALL, data=DataConfig(train=299))}, "its config.data.train is 300"),
        ({"config": replace(SMALL, recipe="mine")}, "its recipe is digits, not mine"),
    ],
)
def test_the_folder_of_another_sweep_is_refused(sweep, change, shown):
    wanted = {"kind": "survival", "grid": GRID, "config": SMALL} | change
    with pytest.raises(RunError, match=f"another sweep: {shown}.*choose another --out"):
        open_sweep(sweep.folder, **wanted)


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"no sweep's folder, it holds thesis\.tex"):
        open_sweep(tmp_path, "survival", GRID, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be a sweep's folder"):
        open_sweep(tmp_path / "file", "survival", GRID, SMALL)


@pytest.mark.parametrize(
    ("grid", "config", "shown"),
    [
        ({"survival": (0.5, 1.5)}, {}, "survival.final is 1.5"),
        ({"depths": (8, 9)}, {}, "depth=9"),
        ({"gatings": ("batch", "sample")}, {"engine": "program"}, "engine is program"),
        ({"depths": (10,)}, {"model": ModelConfig("densenet")}, "no residual block found in"),
        ({}, {"data": DataConfig(size=1)}, "the images have 1x1 pixels"),
        ({}, {"data": DataConfig("cifar10", Path("nowhere"))}, "nowhere: does not exist"),
        ({}, {"survival": SurvivalConfig(schedule=BEYOND)}, "late until .*, which drops no block"),
    ],
)
def test_a_sweep_of_which_a_run_cannot_be_trained_makes_no_folder(grid, config, shown, tmp_path):
    grid, config = replace(GRID, **grid), replace(SMALL, **config)
    with pytest.raises(StochasticDepthError, match=shown):
        open_sweep(tmp_path / "none", "survival", grid, config)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_damaged_description_is_named(sweep, text):
    (sweep.folder / "sweep.json").write_text(text)
    with pytest.raises(RunError, match=r"sweep\.json cannot be understood"):
        open_sweep(sweep.folder, "survival", GRID, SMALL)
