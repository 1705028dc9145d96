"""A trained run, and pictures of its data as files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from stochastic_depth.cli import main
from stochastic_depth.data import load
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig, begin, fit
from support.runs import SILENT


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """ResNet-14, three epochs of digits."""
    path = tmp_path_factory.mktemp("trained") / "run"
    config = replace(RECIPES["digits"](), model=ModelConfig(depth=14), epochs=3)
    run, images = begin(config, path)
    assert len(list(fit(run, images, SILENT))) == 3
    return path


@pytest.fixture(scope="session")
def elastic(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("elastic") / "net.safetensors"
    assert main(["export", str(trained), "--elastic", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def onnx(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    assert main(["export", str(trained), "--format", "onnx", "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> tuple[list[str], torch.Tensor]:
    """Twenty test images as PNG files, and their labels."""
    folder, test = tmp_path_factory.mktemp("pictures"), load("digits").test
    paths = [str(folder / f"{n}.png") for n in range(20)]
    for path, image in zip(paths, test.images, strict=False):
        Image.fromarray(image[0].numpy()).save(path)
    return paths, test.labels[:20]
