import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stochastic_depth as sd
from stochastic_depth.cli import main
from stochastic_depth.data import DataSet, Images, TensorBatches
from stochastic_depth.data.dataset import reduced
from stochastic_depth.data.pictures import evaluation_view, open_picture
from stochastic_depth.export.description import ImageInput, read_description
from stochastic_depth.export.predict import open_classifier, read_pictures
from stochastic_depth.train import reopen

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def test_pictures_of_the_data_set_are_read_as_the_network_was_trained_on_them(trained, pictures):
    _, images = reopen(trained)
    _, description = open_classifier(trained)
    expected = next(images.evaluate("test"))[0][:20]
    assert torch.equal(
        read_pictures([Path(picture) for picture in pictures[0]], description.input), expected
    )


@pytest.mark.parametrize("size", [(300, 400), (1000, 500), (256, 256), (224, 31)])
def test_other_sizes_are_scaled_and_cut_as_torchvision_does(size, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels.numpy()).save(path)
    mine = read_pictures([path], ImageInput((3, 224, 224), 256, (0.0,) * 3, (1.0,) * 3))
    assert torch.equal((mine[0] * 255).round().byte(), evaluation_view(224)(open_picture(path)))


@pytest.mark.parametrize(("side", "size"), [(8, 4), (8, 2), (32, 16), (32, 8), (32, 4)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_reduced_as_a_data_set_in_memory(side, size, channels, tmp_path):
    pixels = torch.randint(256, (4, channels, side, side), generator=torch.manual_seed(0)).byte()
    images = Images(pixels, torch.tensor([0, 1, 0, 1]))
    batches = TensorBatches(
        DataSet("mine", ("a", "b"), *[reduced("mine", images, size)] * 3),
        batch=4,
        augment=False,
        seed=0,
        device="cpu",
    )
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(path)
    moments = (tuple(moment.tolist()) for moment in (batches.mean, batches.std))
    wanted = ImageInput(batches.shape, batches.shorter_side, *moments, batches.scaling)
    assert torch.equal(read_pictures(paths, wanted), next(batches.evaluate("test"))[0])


def test_a_picture_that_is_no_multiple_of_the_size_is_averaged_by_area_and_a_smaller_one_is_not(
    tmp_path,
):
    wanted = ImageInput((1, 3, 3), 3, (0.0,), (1.0,), "area")
    pixels = torch.randint(256, (10, 10), generator=torch.manual_seed(0)).byte()
    Image.fromarray(pixels.numpy()).save(tmp_path / "large.png")
    # Each pixel belongs to the area of 10/3 x 10/3 in which its middle is.
    areas = [slice(0, 3), slice(3, 7), slice(7, 10)]
    expected = [[pixels[rows, columns].double().mean() for columns in areas] for rows in areas]
    found = 255 * read_pictures([tmp_path / "large.png"], wanted)[0, 0]
    assert (found - torch.tensor(expected)).abs().max() <= 1
    small = Image.fromarray(pixels[:2, :2].numpy())
    small.save(tmp_path / "small.png")
    enlarged = small.resize((3, 3), Image.Resampling.BILINEAR)
    found = 255 * read_pictures([tmp_path / "small.png"], wanted)[0, 0]
    assert found.round().byte().tolist() == np.asarray(enlarged).tolist()


def test_a_file_that_does_not_say_how_pictures_are_scaled_keeps_the_bilinear_filter(trained):
    written = json.loads(open_classifier(trained)[1].to_json())
    assert written["input"].pop("scaling") == "area"
    assert read_description(json.dumps(written)).input.scaling == "bilinear"
    written["input"]["scaling"] = "lanczos"
    with pytest.raises(sd.errors.ExportError, match="lanczos"):
        read_description(json.dumps(written))


@pytest.mark.parametrize("kind", ["run", "safetensors", "onnx"])
def test_a_run_and_its_files_see_the_same_in_a_picture(
    kind, trained, elastic, onnx, pictures, capsys, monkeypatch
):
    source = {"run": trained, "safetensors": elastic, "onnx": onnx}[kind]
    monkeypatch.chdir(Path(pictures[0][0]).parent)
    names = [Path(picture).name for picture in pictures[0][:3]]
    assert main(["predict", str(source), *names, "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    _, images = reopen(trained)
    network, description = open_classifier(trained)
    with torch.no_grad():
        p = network(next(images.evaluate("test"))[0][:3]).softmax(1)
    rows = [line for line in shown.splitlines() if "│" in line]
    for row, probabilities in zip(rows, p, strict=True):
        assert f"{100 * probabilities.max().item():.2f} %" in row
        assert f" {description.classes[probabilities.argmax()]} " in row


def test_an_elastic_file_predicts_at_a_depth_and_tells_what_that_costs(elastic, pictures, capsys):
    assert main(["predict", str(elastic), pictures[0][0], "--depth", "0.5"]) == 0
    shown = capsys.readouterr().out
    assert "3 of 6 blocks: test error " in shown
    assert "ms an image" in shown


def test_names_are_told_as_they_are(trained, pictures, tmp_path, capsys):
    odd = tmp_path / "[red]x[b] é.png"
    odd.write_bytes(Path(pictures[0][0]).read_bytes())
    assert main(["predict", str(trained), str(odd)]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    shown = "".join(line.split("│")[1] for line in rows)
    assert "[red]x[b]é.png" in "".join(shown.split())  # it is wrapped, at the space too


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, "bad.png"),
        (b"", "bad.png"),
        (b"\x80\x04N.", "bad.png"),
        (b"P6 1 100000000 255\n", "bad.png"),
    ],
)
def test_what_is_no_picture_is_an_error_of_one_line(content, shown, trained, tmp_path, capsys):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    assert main(["predict", str(trained), str(path)]) == 1
    error = capsys.readouterr().err
    assert shown in error
    assert error.count("\n") == 1


def test_a_picture_like_a_hair_is_refused(tmp_path):
    Image.new("L", (1, 4000)).save(tmp_path / "hair.png")
    with pytest.raises(sd.errors.DataError, match=r"hair\.png: .* 1x4000 pixels.*: crop it"):
        read_pictures([tmp_path / "hair.png"], ImageInput((1, 8, 8), 8, (0.5,), (1.0,)))


def test_what_is_no_network_is_an_error_of_one_line(trained, pictures, tmp_path, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"\x80\x04N.")
    (tmp_path / "bad.pt2").write_bytes(b"\x80\x04N.")
    cases = ["bad.onnx", "bad.pt2", "none.onnx", "none.safetensors", "none"]
    for name in cases:
        assert main(["predict", str(tmp_path / name), pictures[0][0]]) == 1
        error = capsys.readouterr().err
        assert name in error
        assert error.count("\n") == 1, error
    assert main(["predict", str(trained), pictures[0][0], "--depth", "0.5"]) == 1
    assert "--elastic" in capsys.readouterr().err
