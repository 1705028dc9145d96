"""Every data set in every layout, from files to a test error, as a user would."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stochastic_depth.cli import main
from stochastic_depth.data.cifar import CIFAR10, CIFAR100
from stochastic_depth.train.run_folder import open_run
from support.data_sets import write_cifar, write_imagenet, write_svhn

SMALL = ["--model.depth", "8", "--epochs", "1", "--data.validation", "20", "--quiet"]


def images(count, classes, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % classes


@pytest.mark.parametrize("variant", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("layout", ["pickles", "binary", "parquet", "folders"])
def test_cifar_trains_from_every_layout(tmp_path, variant, layout):
    classes = len(variant.classes)
    root = tmp_path / "data"
    parts = (*images(3 * classes, classes, 0), *images(classes, classes, 1))
    write_cifar(layout, root, variant, *parts)
    name = "cifar10" if variant is CIFAR10 else "cifar100"
    arguments = ["train", f"{name}-resnet110", *SMALL, "--data.root", str(root)]
    assert main([*arguments, "--run", str(tmp_path / "run")]) == 0
    assert main(["eval", str(tmp_path / "run")]) == 0


def test_svhn_is_evaluated_every_so_many_steps(tmp_path):
    write_svhn(tmp_path)
    arguments = ["train", "svhn-resnet152", *SMALL, "--data.root", str(tmp_path)]
    options = ["--optimizer.batch", "10", "--evaluate-every", "5", "--run", str(tmp_path / "run")]
    assert main([*arguments, *options]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [5, 10, 13]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_imagenet_trains_from_a_folder_tree_with_workers(tmp_path):
    write_imagenet(tmp_path / "data")
    arguments = ["train", "imagenet-resnet50", "--epochs", "1", "--data.root"]
    options = ["--optimizer.batch", "7", "--data.workers", "2", "--quiet"]
    run = tmp_path / "run"
    assert main([*arguments, str(tmp_path / "data"), *options, "--run", str(run)]) == 0
    record = json.loads((run / "metrics.jsonl").read_text())
    assert record["step"] == 3
    assert 0 < record["active_blocks"] <= 16
    assert json.loads((run / "config.json").read_text())["data"]["shape"] == [3, 224, 224]


def test_a_data_set_that_has_moved_is_found_by_its_content(tmp_path, capsys, monkeypatch):
    parts = (*images(40, 10, 0), *images(10, 10, 1))
    write_cifar("binary", tmp_path / "here", CIFAR10, *parts)
    run = str(tmp_path / "run")
    arguments = ["train", "cifar10-resnet110", *SMALL, "--data.root", str(tmp_path / "here")]
    assert main([*arguments, "--run", run]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    for command in (["eval", run], ["train", "--resume", run]):
        for given, shown in (
            ([], "here, the data of RUN, does not exist: give --data DIR"),
            (["--data", "no"], "no, the data of RUN, does not exist in TMP: give --data DIR"),
        ):
            assert main([*command, *given]) == 1
            shown = shown.replace("RUN", run).replace("TMP", str(tmp_path))
            assert shown in capsys.readouterr().err
    assert main(["eval", run, "--data", str(tmp_path / "there")]) == 0
    write_cifar("binary", tmp_path / "other", CIFAR10, *images(40, 10, 7), *images(10, 10, 8))
    for command in (["train", "--resume", run], ["eval", run]):
        assert main([*command, "--data", str(tmp_path / "other")]) == 1
        assert "fingerprint" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_is_named_and_the_same_command_works_once_it_can(
    tmp_path, capsys
):
    for part in ("train", "val"):
        for name in ("dark", "bright"):
            (folder := tmp_path / "data" / part / name).mkdir(parents=True)
            for n in range(6):
                pixels = np.full((32, 32, 3), 30 * n + 90 * (name == "bright"), np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    run, broken = tmp_path / "run", tmp_path / "data/train/dark/3.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:20])
    arguments = ["train", "pictures", *SMALL, "--data.root", str(tmp_path / "data")]
    arguments += ["--data.validation", "4", "--evaluate-every", "1", "--run", str(run)]
    assert main(arguments) == 1
    assert f"{broken}: no readable" in capsys.readouterr().err
    assert not run.exists()
    compare = ["compare", *arguments[1:-2], "--seeds", "1", "--out", str(tmp_path / "compared")]
    assert main(compare) == 1
    broken.write_bytes(whole)
    assert main(arguments) == 0
    assert main(compare) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    open_run(run).remove_untrained()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_page_on_own_pictures_works_as_it_is_written(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs/how-to/own-pictures.md").read_text()
    code = dict(re.findall(r"^```(python|bash)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(tmp_path)
    exec(code["python"], {})
    for line in code["bash"].splitlines():
        program, *arguments = shlex.split(line)
        assert program == "stochastic-depth"
        assert main(arguments) == 0, line
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "pictures: cifar-resnet 8, 24 images → runs/mine" in shown.out
    assert shown.out.count("0.png") == 2
    assert min(shown.out.count("dark"), shown.out.count("bright")) >= 2
