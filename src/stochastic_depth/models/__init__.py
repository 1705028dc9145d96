"""The reference networks; the residual ones are built from `Residual` units."""

from stochastic_depth.models.cifar_resnet import CifarResNet
from stochastic_depth.models.densenet import DenseNet
from stochastic_depth.models.imagenet_resnet import ImageNetResNet

__all__ = ["CifarResNet", "DenseNet", "ImageNetResNet"]
