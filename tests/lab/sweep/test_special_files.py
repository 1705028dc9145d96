"""A sweep's folder from somebody else: nothing in it is used through a link, a pipe or a device."""

import os

import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.lab.recorded import read_sources
from stochastic_depth.lab.sweep.folder import open_sweep
from stochastic_depth.lab.sweep.workers import train_point
from support.small_sweep import GRID, SMALL
from support.special_files import KINDS, put

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def mine(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis").write_bytes(b"mine")
    return folder / "thesis"


@pytest.mark.parametrize("name", ["sweep.json", "lock"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_a_sweep_are_regular_ones(sweep, mine, name, kind):
    (sweep.folder / name).unlink(missing_ok=True)
    put(sweep.folder / name, kind, mine)
    with pytest.raises(RunError, match="expected a regular file: remove it"):
        open_sweep(sweep.folder, "survival", GRID, SMALL)
    if name == "sweep.json":
        with pytest.raises(RunError, match="expected a regular file: remove it"):
            read_sources([sweep.folder])
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["runs", "claims"])
def test_the_folders_of_a_sweep_are_no_links(sweep, mine, name):
    (sweep.folder / name).rmdir()
    (sweep.folder / name).symlink_to(mine.parent)
    with pytest.raises(RunError, match=f"{name} is a link or a file, expected a folder: remove it"):
        open_sweep(sweep.folder, "survival", GRID, SMALL)
    assert os.listdir(mine.parent) == ["thesis"]


def test_a_run_folder_that_is_a_link_is_neither_emptied_nor_trained_in(sweep, mine):
    point = sweep.grid.points()[0]
    sweep.path(point).symlink_to(mine.parent)
    with pytest.raises(RunError, match=r"is a link.*, expected a .*folder: remove it"):
        train_point(sweep, point, lambda: None)
    assert os.listdir(mine.parent) == ["thesis"]
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", KINDS)
def test_why_a_run_failed_is_read_from_a_regular_file(sweep, mine, kind):
    point = sweep.grid.points()[0]
    sweep.path(point).mkdir()
    put(sweep.path(point) / "failed.txt", kind, mine)
    with pytest.raises(RunError, match=r"failed\.txt cannot be read: .*expected a regular file"):
        sweep.failure(point)
