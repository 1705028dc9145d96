"""The reference networks; the residual networks among them are built from `Residual` units."""

from stochastic_depth.models.densenet import DenseNet
from stochastic_depth.models.networks import Network
from stochastic_depth.models.resnet import CifarResNet, ImageNetResNet
from stochastic_depth.models.transformer import VisionTransformer

__all__ = ["CifarResNet", "DenseNet", "ImageNetResNet", "Network", "VisionTransformer"]
