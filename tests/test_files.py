"""Regular files alone, in bounds, written whole; nothing through a link, a pipe or a device."""

import os

import pytest

from stochastic_depth import files
from stochastic_depth.errors import RunError
from support.special_files import KINDS, put


def test_a_file_is_replaced_as_a_whole(tmp_path):
    for content in (b"first", b"second"):
        files.write_whole(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_where_nothing_can_be_written_the_file_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(RunError, match=r"f could not be written"):
        files.write_whole(tmp_path / "f", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with pytest.raises(RunError, match=r"nowhere/f could not be written"):
        files.write_whole(tmp_path / "nowhere" / "f", b"content")


def test_folders_are_made_and_a_file_in_their_place_is_named(mine):
    files.make_folders(mine.parent / "a" / "b")
    files.make_folders(mine.parent / "a" / "b")
    assert (mine.parent / "a" / "b").is_dir()
    with pytest.raises(RunError, match=r"mine is a file, not a folder"):
        files.make_folders(mine)
    with pytest.raises(RunError, match=r"mine/c cannot be created: Not a directory"):
        files.make_folders(mine / "c")


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".unfinished-abc").write_bytes(b"half")
    (tmp_path / "whole").write_bytes(b"whole")
    files.remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_neither_read_nor_written(tmp_path, mine, kind):
    path = put(tmp_path / "f", kind, mine)
    for use in (
        lambda: files.open_file(path),
        lambda: files.read_file(path, 10),
        lambda: files.require_file(path),
        lambda: files.require_writable(path),
        lambda: files.open_for_appending(path),
    ):
        with pytest.raises(OSError, match=r"expected a regular file: remove it"):
            use()
    if kind == "pipe":
        with pytest.raises(RunError, match=r"f could not be written: it is a pipe, expected"):
            files.write_whole(path, b"content")
    else:
        files.write_whole(path, b"content")
        assert not path.is_symlink()
        assert path.read_bytes() == b"content"
    assert mine.read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == ["f", "mine"]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_where_links_are_allowed_they_lead_to_regular_files(tmp_path, mine, kind):
    put(tmp_path / "f", "link", mine)
    assert files.read_file(tmp_path / "f", 10, follow_links=True) == b"mine"
    put(tmp_path / "special", kind, mine)
    (tmp_path / "link").symlink_to(tmp_path / "special")
    with pytest.raises(OSError, match=r"it is a (pipe|device), expected a regular file"):
        files.read_file(tmp_path / "link", 10, follow_links=True)


def test_folders_that_are_links_are_the_users_only_before_the_folder_that_is_worked_in(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "checkpoints").mkdir(parents=True)
    (elsewhere / "checkpoints" / "f").write_bytes(b"mine")
    (tmp_path / "run").symlink_to(elsewhere)
    run = tmp_path / "run"
    path = run / "checkpoints" / "f"
    assert files.read_file(path, 10, inside=run) == b"mine"
    files.write_whole(path, b"ours", inside=run)
    assert path.read_bytes() == b"ours"
    for use in (
        lambda: files.read_file(path, 10, inside=tmp_path),
        lambda: files.names_in(path.parent, inside=tmp_path),
        lambda: files.remove_file(path, inside=tmp_path),
        lambda: files.make_folder(path.parent, inside=tmp_path),
        lambda: files.open_for_appending(path, inside=tmp_path),
        lambda: files.remove_unfinished(path.parent, inside=tmp_path),
    ):
        with pytest.raises(OSError, match="run is a link or a file, expected a folder"):
            use()
    with pytest.raises(RunError, match="run is a link or a file, expected a folder"):
        files.write_whole(path, b"theirs", inside=tmp_path)
    assert path.read_bytes() == b"ours"


def test_a_file_is_read_up_to_its_bound(mine):
    assert files.read_file(mine, 4) == b"mine"
    with pytest.raises(OSError, match="it has 4 bytes, at most 3 are read"):
        files.read_file(mine, 3)


def test_a_file_that_hides_its_size_is_read_up_to_its_bound():
    with pytest.raises(OSError, match="it has 11 bytes, at most 10 are read"):
        files.read_file(files.Path("/proc/self/maps"), 10)


def test_a_file_with_a_second_name_is_read_and_not_changed_in_place(tmp_path, mine):
    path = tmp_path / "f"
    os.link(mine, path)
    assert files.read_file(path, 4) == b"mine"
    with pytest.raises(OSError, match="hard link, and its other name would be changed"):
        files.open_for_appending(path)
    files.write_whole(path, b"ours")
    assert (path.read_bytes(), mine.read_bytes()) == (b"ours", b"mine")


def test_an_empty_folder_is_replaced_and_one_with_anything_in_it_is_not(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    with files.whole_folder(path) as folder:
        (folder / "f").write_bytes(b"ours")
    assert os.listdir(path) == ["f"]
    with pytest.raises(RunError, match="run cannot be created"), files.whole_folder(path):
        pass
    assert os.listdir(tmp_path) == ["run"]
