"""Exported networks and pictures that are links, pipes or devices."""

import pytest

from stochastic_depth.cli import main
from support.special_files import put


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_an_exported_network_is_a_regular_file(tmp_path, mine, pictures, suffix, kind, capsys):
    path = put(tmp_path / f"net{suffix}", kind, mine)
    assert main(["predict", str(path), pictures[0][0]]) == 1
    shown = capsys.readouterr().err
    assert "expected a regular file: remove it" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("kind", ["pipe", "device", "link to nowhere"])
def test_a_picture_is_a_regular_file(trained, tmp_path, mine, kind, capsys):
    path = put(tmp_path / "picture.png", kind, mine)
    assert main(["predict", str(trained), str(path)]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {path} cannot be read: ")
    assert shown.count("\n") == 1


def test_a_picture_that_is_not_there_is_not_to_be_removed(trained, tmp_path, capsys):
    assert main(["predict", str(trained), str(tmp_path / "no.png")]) == 1
    shown = capsys.readouterr().err
    assert shown == f"error: {tmp_path / 'no.png'} cannot be read: No such file or directory\n"


def test_an_export_replaces_a_link_and_refuses_a_pipe(trained, tmp_path, mine, capsys):
    link = put(tmp_path / "net.safetensors", "link", mine)
    assert main(["export", str(trained), "--out", str(link)]) == 0
    assert not link.is_symlink()
    pipe = put(tmp_path / "pipe.safetensors", "pipe", mine)
    assert main(["export", str(trained), "--out", str(pipe)]) == 1
    assert "is a device or a pipe, and no file: choose another name" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["report.html", "figures/training-curves.csv"])
def test_a_report_replaces_a_link_and_leaves_what_it_leads_to(trained, tmp_path, mine, name):
    (tmp_path / "figures").mkdir()
    link = put(tmp_path / name, "link", mine)
    out, figures = tmp_path / "report.html", tmp_path / "figures"
    assert main(["report", str(trained), "--out", str(out), "--figures", str(figures)]) == 0
    assert mine.read_bytes() == b"mine"
    assert not link.is_symlink() or name.startswith("figures")
