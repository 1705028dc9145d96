"""One function for each published number; each returns a complete configuration."""

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

__all__ = ["PUBLISHED", "RECIPES", "Published", "constant_depth"]
