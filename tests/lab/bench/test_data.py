from dataclasses import replace

import numpy as np
import pytest
import torch

from stochastic_depth.data.cifar import CIFAR10
from stochastic_depth.lab.bench import data as bench
from stochastic_depth.lab.bench.data import DATA, ORDER, data_and_steps, data_shares, open_images
from stochastic_depth.timing import take_turns
from stochastic_depth.train import Config
from stochastic_depth.train.config import DataConfig, ModelConfig, OptimizerConfig
from stochastic_depth.train.runtime import Runtime
from support.data_sets import write_pickles

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime("cpu", "float32", 1)
CONFIG = Config(
    data=DataConfig("cifar10"), model=ModelConfig(depth=8), optimizer=OptimizerConfig(batch=4)
)


@pytest.fixture
def generated(monkeypatch):
    monkeypatch.setattr(bench, "IMAGES", 10)
    return open_images(CONFIG, CPU)


def test_generated_images_are_of_cifars_shape_and_augmented(generated):
    assert generated.name == "generated"
    assert generated.shape == (3, 32, 32)
    assert len(generated.classes) == 10
    (first, labels), *_ = generated.train(0)
    assert first.shape == (4, 3, 32, 32)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert (first == 0).any()  # the border that a crop lets in
    assert set(labels.tolist()) <= set(range(10))


def test_with_a_folder_the_images_are_cifars(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5100, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(5100) % 10
    write_pickles(tmp_path / "cifar", CIFAR10, pixels, labels, pixels[:10], labels[:10])
    images = open_images(replace(CONFIG, data=DataConfig("cifar10", tmp_path / "cifar")), CPU)
    assert images.name == "cifar10"
    assert images.steps_per_epoch == 25


def test_a_step_takes_its_data_too_and_goes_on_into_the_next_epoch(generated):
    steps = data_and_steps({"step": CONFIG}, generated, CPU)
    assert steps.keys() == {ORDER, DATA, "step"}
    rounds = list(take_turns(steps, 2 * generated.steps_per_epoch + 1, warmup=1))
    shares = data_shares(rounds, 3)["step"]
    assert min(shares.seconds) > 0
    assert shares.median < 1  # a single round may have lost its core to another program


def test_the_order_counts_by_its_part():
    rounds = [{ORDER: 10.0, DATA: 1.0, "step": 8.0}, {ORDER: 0.0, DATA: 1.0, "step": 4.0}]
    assert data_shares(rounds, 5)["step"].seconds == pytest.approx((0.3, 0.25))
