from dataclasses import replace

import pytest

from stochastic_depth.lab.titles import titles
from stochastic_depth.recipes import RECIPES

DIGITS = RECIPES["digits"]()


def with_optimizer(**changes):
    return replace(DIGITS, optimizer=replace(DIGITS.optimizer, **changes))


@pytest.mark.parametrize(
    ("configs", "ends"),
    [
        ([DIGITS], [""]),
        (
            [DIGITS, with_optimizer(learning_rate=0.5)],
            [", learning rate 0.1", ", learning rate 0.5"],
        ),
        (
            [DIGITS, replace(with_optimizer(milestones=(0.3, 0.9)), precision="bfloat16")],
            [
                ", milestones 0.5, 0.75, precision float32",
                ", milestones 0.3, 0.9, precision bfloat16",
            ],
        ),
        # A setting that is not given has no value to show.
        (
            [DIGITS, replace(DIGITS, data=replace(DIGITS.data, augment=True))],
            ["", ", augment True"],
        ),
        (
            [DIGITS, with_optimizer(batch=8), DIGITS],
            [", batch 128", ", batch 8", ", batch 128 (2)"],
        ),
    ],
)
def test_experiments_are_told_apart_by_the_settings_that_differ(configs, ends):
    name, *_ = titles([DIGITS])
    assert titles(configs) == [name + end for end in ends]


def test_other_networks_data_and_epochs_are_told_apart_by_them_alone():
    others = [RECIPES[name]() for name in ("digits", "cifar10-small", "cifar10-small-vit")]
    found = titles([*others, replace(DIGITS, epochs=1)])
    assert [title.count(",") for title in found] == [1, 2, 2, 1]
    assert found[3] == found[0].replace("20 epochs", "1 epoch")
