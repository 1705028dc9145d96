import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from stochastic_depth.errors import RunError, StochasticDepthError
from stochastic_depth.lab.recorded import read_sources
from stochastic_depth.lab.sweep.folder import open_sweep, read_sweep
from stochastic_depth.lab.sweep.progress import sweep_table
from stochastic_depth.lab.sweep.workers import claim_next, read_claims, train_point
from stochastic_depth.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
    open_run,
)
from stochastic_depth.train.schedule_config import ScheduleConfig
from support.data_sets import write_pictures
from support.runs import edit_description
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


@pytest.mark.parametrize("described", [True, False])
def test_the_sweeps_own_folder_may_hold_a_report_and_logs(sweep, described):
    for name in ("report.html", "sweep.log"):
        (sweep.folder / name).write_text("")
    if not described:  # a damaged description is removed, and written again
        (sweep.folder / "sweep.json").unlink()
    assert open_sweep(sweep.folder, "survival", GRID, SMALL) == sweep


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
        ({"depths": (10,)}, {"model": ModelConfig("densenet")}, "has no residual blocks"),
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
    shown = (
        r"sweep\.json cannot be understood: remove it and repeat the command that began the sweep"
    )
    with pytest.raises(RunError, match=shown):
        open_sweep(sweep.folder, "survival", GRID, SMALL)
    (sweep.folder / "sweep.json").unlink()
    assert open_sweep(sweep.folder, "survival", GRID, SMALL) == sweep


@pytest.fixture
def pictures(tmp_path):
    """The configuration of short runs on pictures of one's own, which can be changed."""
    write_pictures(tmp_path / "mine")
    data = DataConfig("folder", tmp_path / "mine", size=16, workers=0)
    return replace(SMALL, data=data, optimizer=OptimizerConfig(batch=8), epochs=1)


def test_a_sweep_is_trained_on_the_pictures_that_it_began_on(pictures, tmp_path):
    sweep = open_sweep(tmp_path / "sweep", "survival", GRID, pictures)
    first, second, *_ = GRID.points()
    train_point(sweep, first, lambda: None)
    began = open_run(sweep.path(first)).fingerprint
    assert json.loads((sweep.folder / "sweep.json").read_text())["fingerprint"] == began
    write_pictures(tmp_path / "mine", seed=1)
    other = open_sweep(tmp_path / "other", "survival", GRID, pictures).fingerprint
    both = f"{began[:12]}, this data has {other[:12]}: give the data .* choose another --out"
    with pytest.raises(RunError, match=both):
        open_sweep(sweep.folder, "survival", GRID, pictures)
    with pytest.raises(RunError, match=both):
        train_point(sweep, second, lambda: None)
    assert not sweep.path(second).exists()
    write_pictures(tmp_path / "mine")
    assert open_sweep(sweep.folder, "survival", GRID, pictures) == sweep


def without_fingerprint(sweep):
    """As sweeps were begun before their data was recorded."""
    path = sweep.folder / "sweep.json"
    described = json.loads(path.read_text())
    del described["fingerprint"]
    path.write_text(json.dumps(described))


@pytest.mark.parametrize("older", [False, True])
def test_points_on_different_data_are_not_averaged(sweep, older):
    points = GRID.points()[:2]
    for point in points:
        train_point(sweep, point, lambda: None)
    if older:
        without_fingerprint(sweep)
    assert len(read_sources([sweep.folder]).sweeps[0].finished()) == 2
    assert open_sweep(sweep.folder, "survival", GRID, SMALL) == sweep
    began = open_run(sweep.path(points[0])).fingerprint

    def on_birds(description):
        description["data"]["fingerprint"] = "of birds " * 2

    edit_description(sweep.path(points[1]), on_birds)
    both = f"fingerprint (of birds of .*{began[:12]}|{began[:12]}.* of birds of )"
    for read in (
        lambda: read_sources([sweep.folder]),
        lambda: sweep_table(read_sweep(sweep.folder)),
        lambda: open_sweep(sweep.folder, "survival", GRID, SMALL),
    ):
        with pytest.raises(RunError, match=both):
            read()
    edit_description(sweep.path(points[0]), on_birds)
    if older:
        assert read_sources([sweep.folder])
    else:
        with pytest.raises(RunError, match=f"data with fingerprint {began[:12]}, its runs began"):
            read_sources([sweep.folder])


def test_finished_runs_under_the_names_of_others_are_refused(sweep):
    first, second, *_ = GRID.points()
    train_point(sweep, first, lambda: None)
    sweep.path(first).rename(sweep.path(second))
    shown = (
        rf"{second.name} is not the run of this .* its config\.survival\.final is 0\.3, not 0\.6"
    )
    for read in (
        lambda: read_sources([sweep.folder]),
        lambda: sweep_table(sweep),
        lambda: open_sweep(sweep.folder, "survival", GRID, SMALL),
    ):
        with pytest.raises(RunError, match=shown):
            read()


def test_a_sweep_that_has_ended_is_read_without_a_lock_and_without_its_data(
    pictures, tmp_path, monkeypatch
):
    grid = replace(GRID, seeds=(0,))
    sweep = open_sweep(tmp_path / "sweep", "survival", grid, pictures)
    while claim := claim_next(sweep):
        train_point(sweep, claim.point, lambda: None)
        claim.release()

    class ReadOnly:
        def __init__(self, *args, **options):
            raise OSError(errno.EROFS, "Read-only file system")

    for module in ("folder", "workers"):
        monkeypatch.setattr(f"stochastic_depth.lab.sweep.{module}.FileLock", ReadOnly)
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    again = open_sweep(sweep.folder, "survival", grid, pictures)
    assert again == sweep
    assert claim_next(again) is None
    assert read_claims(again) == []
    assert sweep_table(again).row_count == 3
    (tmp_path / "elsewhere").rename(tmp_path / "mine")
    with pytest.raises(RunError, match="new cannot be a sweep's folder: Read-only file system"):
        open_sweep(tmp_path / "new", "survival", grid, pictures)
