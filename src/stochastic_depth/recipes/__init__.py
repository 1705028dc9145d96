"""Functions that return a complete configuration, for published numbers and for others."""

import inspect
from collections.abc import Callable

from stochastic_depth.recipes import paper, small
from stochastic_depth.recipes.paper import PUBLISHED, Published, constant_depth
from stochastic_depth.train.config import Config

RECIPES: dict[str, Callable[[], Config]] = {
    recipe().recipe: recipe
    for recipe in (
        small.digits,
        small.digits_constant,
        small.cifar10_small,
        small.cifar10_small_constant,
        small.cifar10_small_vit,
        small.pictures,
        paper.cifar10_resnet110,
        paper.cifar10_resnet110_constant,
        paper.cifar100_resnet110,
        paper.cifar100_resnet110_constant,
        paper.svhn_resnet152,
        paper.svhn_resnet152_constant,
        paper.cifar10_resnet1202,
        paper.cifar10_resnet1202_constant,
        paper.imagenet_resnet152,
        paper.imagenet_resnet152_constant,
        paper.imagenet_resnet50,
        paper.cifar10_densenet_bc100,
        paper.cifar100_densenet_bc100,
        paper.cifar10_densenet_bc190,
    )
}
"""Recipes by their name on the command line."""


def describe_recipe(name: str) -> str:
    """What a recipe is, its source, command, published result and cost.

    The first line is a summary.
    """
    first, *lines = inspect.cleandoc(RECIPES[name].__doc__ or "").splitlines()
    if published := PUBLISHED.get(name):
        first = f"{first.removesuffix('.')}: {published}."
        cost = next(number for number, line in enumerate(lines) if line.startswith("Cost: "))
        lines.insert(cost, f"Published: {published}{published.note}.")
    return "\n".join([first, *lines])


__all__ = ["PUBLISHED", "RECIPES", "Published", "constant_depth", "describe_recipe"]
