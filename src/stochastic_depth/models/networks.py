"""The reference networks by name."""

from stochastic_depth.models.densenet import DenseNet
from stochastic_depth.models.resnet import CifarResNet, ImageNetResNet
from stochastic_depth.models.transformer import VisionTransformer

Network = CifarResNet | DenseNet | ImageNetResNet | VisionTransformer

NETWORKS: dict[str, type[Network]] = {
    "cifar-resnet": CifarResNet,
    "imagenet-resnet": ImageNetResNet,
    "densenet": DenseNet,
    "vit": VisionTransformer,
}
"""The networks by the name that a configuration gives them."""
