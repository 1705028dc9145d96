"""What a command writes never takes the place of another file, and is checked before the work."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stochastic_depth.cli import main
from stochastic_depth.cli.export import Export
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.recorded import read_run
from stochastic_depth.models import CifarResNet
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import DataConfig, ModelConfig, begin, fit, open_run
from stochastic_depth.train.checkpoint import load_checkpoint, save_checkpoint
from support.runs import SILENT

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = [
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "lock",
    "failed.txt",
    "analysis/pruning.json",
    "checkpoints/step-000000010.ckpt",
]
COMMANDS = {
    "report": "report RUN --out FILE",
    "export": "export RUN --format safetensors --out FILE",
    "bench": "bench skip --out FILE",
    "inspect": "inspect timm/resnet18 --out FILE",
    "inspect page": "inspect timm/resnet18 --report FILE",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run"
    config = replace(
        RECIPES["digits"](), data=DataConfig(train=320), model=ModelConfig(depth=8), epochs=2
    )
    run, images = begin(config, path)
    list(fit(run, images, SILENT))
    return path


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(finished, tmp_path / "run")


def refused(capsys, command: str, run, file) -> str:
    assert main([{"RUN": str(run), "FILE": str(file)}.get(a, a) for a in command.split()]) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_files_of_a_run_are_not_written_over(command, name, run, capsys):
    (run / "analysis").mkdir()
    before = (run / name).read_bytes() if (run / name).exists() else None
    assert f"{name} is among the files of the run {run}" in refused(
        capsys, command, run, run / name
    )
    assert ((run / name).read_bytes() if (run / name).exists() else None) == before


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_files_of_another_kind_are_not_written_over(command, run, tmp_path, capsys):
    mine = tmp_path / "thesis"
    mine.write_text("of years")
    assert "thesis is not " in (shown := refused(capsys, command, run, mine))
    assert "choose another name, or remove it" in shown
    assert mine.read_text() == "of years"


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_device_and_a_folder_are_told_with_a_remedy_that_works(command, run, tmp_path, capsys):
    assert "/dev/null is a device or a pipe, and no file: choose another name" in refused(
        capsys, command, run, "/dev/null"
    )
    assert "is a folder, and no file: choose another name" in refused(
        capsys, command, run, tmp_path
    )


def test_a_file_that_cannot_be_written_is_told_before_a_benchmark(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("stochastic_depth.cli.bench._runtime", lambda _: pytest.fail("it began"))
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "result.json"
    assert main(["bench", "skip", "--out", str(inside)]) == 1
    assert f"{inside} could not be written: Not a directory" in capsys.readouterr().err


SMALL = {
    "report": "report RUN",
    "export": "export RUN --format safetensors",
    "inspect": f"inspect {__name__}:small --repeats 1",
    "inspect page": f"inspect {__name__}:small --repeats 1",
    "bench": "bench skip --depth 8 --batch 2 --size 8 --repeats 2",
    "bench plot": "bench depth --deepest 56 --batch 2 --size 4 --repeats 2",
}
OPTION = {"inspect page": "--report", "bench plot": "--plot"}


def small():
    return CifarResNet(8), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("name", SMALL)
def test_folders_that_are_missing_are_made(name, run, tmp_path):
    out = tmp_path / "new" / "folder" / "written"
    command = [str(run) if word == "RUN" else word for word in SMALL[name].split()]
    assert main([*command, OPTION.get(name, "--out"), str(out)]) == 0
    assert out.stat().st_size


def test_a_result_is_written_over_an_earlier_one_of_its_kind(run, capsys):
    for _ in range(2):
        assert main(["export", str(run), "--out", "net.safetensors"]) == 0
        assert main(["report", str(run), "--out", "new/page.html"]) == 0
    capsys.readouterr()
    assert "net.safetensors is a safetensors file, not a page" in refused(
        capsys, "report RUN --out FILE", run, "net.safetensors"
    )


@pytest.mark.parametrize(("here", "given"), [("run", "."), ("run/mine", "..")])
def test_a_run_that_is_given_without_its_name_has_it(here, given, run, capsys, monkeypatch):
    Path(here).mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    assert main(["export", given]) == 0
    assert capsys.readouterr().out.startswith("run.safetensors (")
    assert read_run(Path(given)).name == "run"


@pytest.mark.parametrize(
    ("given", "out", "chosen"),
    [
        (None, None, "safetensors"),
        (None, "x.onnx", "onnx"),
        (None, "x.pt2", "torch"),
        (None, "x.safetensors", "safetensors"),
        ("onnx", None, "onnx"),
        ("torch", "x.pt", "torch"),
    ],
)
def test_the_name_of_the_file_says_the_format(given, out, chosen, tmp_path):
    asked = Export(tmp_path, format=given, out=out and tmp_path / out)
    assert asked.chosen_format() == chosen


@pytest.mark.parametrize(
    ("given", "out", "shown"),
    [
        (None, "x.net", "has no suffix of a format (.safetensors, .pt2, .onnx)"),
        ("torch", "x.onnx", "leave out --format, or choose a name that ends in .pt2"),
    ],
)
def test_a_name_that_misleads_about_the_format_is_refused(given, out, shown, tmp_path, capsys):
    with pytest.raises(ConfigError, match=re.escape(shown)):
        Export(tmp_path, format=given, out=tmp_path / out).chosen_format()
    options = ["--format", given] if given else []
    assert main(["export", str(tmp_path), "--out", out, *options]) == 2
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["recipes"], ["--version"], ["--help"], ["train", "--help"]])
def test_a_full_disk_under_the_output_is_told(arguments):
    command = [sys.executable, "-m", "stochastic_depth", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == (
        "error: the output cannot be written: No space left on device; make room, then resume the "
        "run or repeat the command\n"
    )


LATIN = {"PYTHONIOENCODING": "latin-1"}
ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.mark.parametrize("encoding", [LATIN, ASCII], ids=["latin-1", "ascii"])
def test_an_encoding_without_arrows_has_something_in_their_place(encoding, run):
    ended = subprocess.run(
        [sys.executable, "-m", "stochastic_depth", "train", "--resume", str(run)],
        env=os.environ | encoding,
        capture_output=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert b" images ? " in ended.stdout


def test_a_page_is_the_same_whatever_the_encoding_of_the_system(run, tmp_path):
    pages = []
    for encoding in (ASCII, {"PYTHONUTF8": "1"}):
        out = tmp_path / "page.html"
        command = [sys.executable, "-m", "stochastic_depth", "report", str(run), "--out", str(out)]
        subprocess.run(command, env=os.environ | encoding, capture_output=True, check=True)
        pages.append(re.sub(r"Written [-\d]+ [\d:]+ UTC", "", out.read_text("utf-8")))
    assert pages[0] == pages[1]


@pytest.mark.parametrize("command", ["eval RUN", "export RUN", "analyze pruning RUN"])
def test_without_checkpoints_the_remedy_is_a_copy_of_them(command, run, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "model.safetensors").unlink()
    shown = refused(capsys, command, run, "")
    assert f"{run} has no checkpoints left: put a copy of {run}/checkpoints in its place" in shown
    assert "--resume" not in shown


@pytest.fixture
def first_is_best(run, monkeypatch):
    """The files of the best checkpoint, which is the first one, and of the last one."""
    monkeypatch.setattr(
        "stochastic_depth.train.open.best_record",
        lambda records: min(records, key=lambda r: r.step),
    )
    best, last = sorted((run / "checkpoints").iterdir())
    return {"best": best, "last": last}


@pytest.fixture(params=["damaged", "of another run"])
def spoil(request, finished, tmp_path):
    """A function that spoils a checkpoint."""

    def spoiled(path):
        if request.param == "damaged":
            path.write_bytes(b"damaged")
            return
        state = load_checkpoint(path, open_run(finished).id)
        save_checkpoint(path, {**state, "run": "f" * 32})

    return spoiled


@pytest.mark.parametrize(("which", "other"), [("best", "last"), ("last", "best")])
def test_where_a_checkpoint_cannot_be_trusted_the_other_one_is_a_remedy_if_it_can(
    which, other, run, capsys, first_is_best, spoil
):
    spoil(first_is_best[which])
    shown = refused(capsys, f"eval RUN --checkpoint {which}", run, "")
    assert f"Put a copy in its place, or use the {'newest' if which == 'best' else 'best'}" in shown
    assert f"--checkpoint {other}" in shown
    assert main(["eval", str(run), "--checkpoint", other]) == 0
    spoil(first_is_best[other])
    for each in (which, other):
        shown = refused(capsys, f"eval RUN --checkpoint {each}", run, "")
        assert first_is_best[each].name in shown
        assert shown.endswith("Put a copy in its place\n")


def test_a_run_that_has_measured_nothing_is_named(run, capsys):
    (run / "model.safetensors").unlink()
    (run / "metrics.jsonl").write_bytes(b"")
    assert main(["report", str(run)]) == 0
    assert f"No record in the journal yet: {run}.\n" in capsys.readouterr().out


def test_a_damaged_onnx_file_is_to_be_exported_again(run, capsys, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"\x08")
    shown = refused(capsys, "predict FILE picture.png", run, "net.onnx")
    assert "export the run again" in shown
