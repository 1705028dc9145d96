"""The reference networks, built from `Residual` units."""

from stochastic_depth.models.cifar_resnet import CifarResNet

__all__ = ["CifarResNet"]
