from dataclasses import replace

import pytest

from stochastic_depth.recipes import PUBLISHED, RECIPES, describe_recipe
from stochastic_depth.train.build import apply_survival, build_model

SHAPES = {"digits": (1, 10), "cifar10": (3, 10), "cifar100": (3, 100), "svhn": (3, 10)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_tells_source_command_result_and_cost(name):
    shown = describe_recipe(name)
    assert all(f"{word}: " in shown for word in ("Source", "Published", "Cost"))
    assert f"Command: stochastic-depth train {name}" in shown
    assert RECIPES[name].__name__ == name.replace("-", "_")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_error_is_in_the_first_line_of_its_recipe(name):
    first, *others = describe_recipe(name).splitlines()
    assert first.endswith(f" error {PUBLISHED[name].error:.2f} %.")
    published = [line for line in others if line.startswith("Published: ")]
    assert [f" error {PUBLISHED[name].error:.2f} %" in line for line in published] == [True]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_a_network_that_can_be_built(name):
    config = RECIPES[name]()
    channels, classes = SHAPES.get(config.data.name, (3, 1000))
    if config.model.depth <= 152:
        build_model(config.model, channels, classes, 0)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("-constant")])
def test_a_constant_twin_differs_in_nothing_else(name):
    twin, config = RECIPES[name]().to_json(), RECIPES[name.removesuffix("-constant")]().to_json()
    assert twin.pop("recipe") == name
    assert twin["survival"].pop("rule") == "constant"
    del config["recipe"], config["survival"]["rule"]
    assert twin == config


def test_the_recipes_that_reproduce_the_paper_follow_it():
    for name in ("cifar10-resnet110", "cifar100-resnet110", "svhn-resnet152"):
        config = RECIPES[name]()
        assert (config.survival.rule, config.survival.final) == ("linear", 0.5)
        network = build_model(replace(config.model, depth=8), 3, 10, 0)
        handle = apply_survival(network, config.survival, 0, 100)
        assert (handle.gate, handle.scale) == ("batch", "inference")
        assert (handle.skipped, handle.settings.balance, handle.settings.closed) == (
            "paper",
            False,
            "skipped",
        )
        assert config.survival.schedule.kind == "none"
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.batch) == (0.1, 128)
        assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 1e-4)
