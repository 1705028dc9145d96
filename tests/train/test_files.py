import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.train.files import remove_unfinished, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path):
    for content in (b"first", b"second"):
        write_whole(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_where_nothing_can_be_written_the_file_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(RunError, match=r"f could not be written"):
        write_whole(tmp_path / "f", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    with pytest.raises(RunError, match=r"nowhere/f could not be written"):
        write_whole(tmp_path / "nowhere" / "f", b"content")


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / ".unfinished-abc").write_bytes(b"half")
    (tmp_path / "whole").write_bytes(b"whole")
    remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]
