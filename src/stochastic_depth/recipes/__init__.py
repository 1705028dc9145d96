"""Functions that return a complete configuration, for published numbers and for others."""

import inspect
from collections.abc import Callable

from stochastic_depth.recipes.paper import (
    PUBLISHED,
    Published,
    cifar10_densenet_bc100,
    cifar10_densenet_bc190,
    cifar10_resnet110,
    cifar10_resnet110_constant,
    cifar10_resnet1202,
    cifar10_resnet1202_constant,
    cifar100_densenet_bc100,
    cifar100_resnet110,
    cifar100_resnet110_constant,
    constant_depth,
    imagenet_resnet50,
    imagenet_resnet152,
    imagenet_resnet152_constant,
    svhn_resnet152,
    svhn_resnet152_constant,
)
from stochastic_depth.recipes.small import (
    cifar10_small,
    cifar10_small_constant,
    cifar10_small_vit,
    digits,
    digits_constant,
    pictures,
)
from stochastic_depth.train.config import Config

RECIPES: dict[str, Callable[[], Config]] = {
    recipe().recipe: recipe
    for recipe in (
        digits,
        digits_constant,
        cifar10_small,
        cifar10_small_constant,
        cifar10_small_vit,
        pictures,
        cifar10_resnet110,
        cifar10_resnet110_constant,
        cifar100_resnet110,
        cifar100_resnet110_constant,
        svhn_resnet152,
        svhn_resnet152_constant,
        cifar10_resnet1202,
        cifar10_resnet1202_constant,
        imagenet_resnet152,
        imagenet_resnet152_constant,
        imagenet_resnet50,
        cifar10_densenet_bc100,
        cifar100_densenet_bc100,
        cifar10_densenet_bc190,
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
