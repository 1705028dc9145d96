import json

import pytest
import torch
from PIL import Image

from stochastic_depth.cli import main
from stochastic_depth.data.folder_batches import FolderBatches
from stochastic_depth.lab.bench.pictures import generate_picture, measure_decoding, write_tree

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generated_pictures_are_of_the_size_of_imagenets(tmp_path):
    write_tree(tmp_path, 3)
    files = sorted(tmp_path.glob("train/*/*.jpeg"))
    assert [path.parent.name for path in files] == ["class0", "class0", "class1"]
    for path in files:
        with Image.open(path) as picture:
            assert picture.size == (500, 375)
        assert 80_000 < path.stat().st_size < 140_000  # ImageNet's take 108 KB on average
    assert torch.equal(generate_picture(1), generate_picture(1))
    assert not torch.equal(generate_picture(1), generate_picture(2))


def test_all_pictures_after_the_first_batches_are_counted_on_the_clock(tmp_path, monkeypatch):
    write_tree(tmp_path, 8)
    images = FolderBatches(tmp_path, batch=2, seed=0, device="cpu", workers=0, image_size=16)
    ticks = iter([10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert list(measure_decoding(images, [0], 2)) == [[6 / 2], [6 / 1]]


def test_pictures_are_decoded_by_each_number_of_workers_and_a_network_takes_them(tmp_path, capsys):
    out = tmp_path / "pictures.json"
    options = "--depth 50 --batch 2 --pictures 8 --workers 1 0 --repeats 2 --precision float32"
    assert main(["bench", "pictures", *options.split(), "--out", str(out)]) == 0
    assert "decoded, cut and scaled" in capsys.readouterr().out
    shown = json.loads(out.read_text())
    assert list(shown["decoded_per_second"]) == ["1", "0"]
    assert all(len(rates) == 2 and min(rates) > 0 for rates in shown["decoded_per_second"].values())
    assert all(rate > 0 for rate in shown["taken_per_second"].values())


def test_workers_that_leave_nothing_to_measure_are_refused(capsys):
    assert main("bench pictures --workers 4 --pictures 64".split()) == 2
    assert "each worker makes" in capsys.readouterr().err
