"""CIFAR-10 and CIFAR-100 in every public layout, one file for each."""

from stochastic_depth.data.cifar.layout import find_cifar, read_cifar
from stochastic_depth.data.cifar.variants import CIFAR10, CIFAR100

__all__ = ["CIFAR10", "CIFAR100", "find_cifar", "read_cifar"]
