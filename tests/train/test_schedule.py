import pytest

from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import OptimizerConfig
from stochastic_depth.train.build import learning_rate


def test_the_rate_is_divided_by_ten_at_half_and_three_quarters():
    rates = [learning_rate(OptimizerConfig(), step, 100, 10) for step in range(100)]
    assert rates == pytest.approx([0.1] * 50 + [0.01] * 25 + [0.001] * 25)


def test_a_milestone_falls_on_the_nearest_step():
    config = OptimizerConfig(milestones=(0.55,))
    assert 0.55 * 100 > 55
    rates = [learning_rate(config, step, 100, 10) for step in range(100)]
    assert rates == pytest.approx([0.1] * 55 + [0.01] * 45)


def test_a_warmup_ends_on_the_nearest_step():
    config = OptimizerConfig(warmup_epochs=0.55, milestones=(0.9,))
    assert 0.55 * 100 > 55
    rates = [learning_rate(config, step, 200, 100) for step in range(180)]
    assert rates == pytest.approx([0.01] * 55 + [0.1] * 125)


def test_svhn_drops_after_30_and_35_of_50_epochs():
    config = RECIPES["svhn-resnet152"]()
    rates = [learning_rate(config.optimizer, 7 * e, 7 * 50, 7) for e in range(config.epochs)]
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 5 + [0.001] * 15)


def test_imagenet_drops_every_30_of_90_epochs():
    config = RECIPES["imagenet-resnet152"]()
    rates = [learning_rate(config.optimizer, 7 * e, 7 * 90, 7) for e in range(config.epochs)]
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30)


def test_the_1202_layer_network_warms_up_for_ten_epochs():
    config = RECIPES["cifar10-resnet1202"]()
    rates = [learning_rate(config.optimizer, 7 * e, 7 * 300, 7) for e in range(config.epochs)]
    assert rates == pytest.approx([0.01] * 10 + [0.1] * 140 + [0.01] * 75 + [0.001] * 75)
