"""ImageNet: the paper's section 4, and a residual network of the usual size."""

from dataclasses import replace

from stochastic_depth.recipes.variant import constant_depth
from stochastic_depth.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
)


def imagenet_resnet152() -> Config:
    """ResNet-152 on ImageNet, stochastic depth: validation error 23.38 %.

    Source: the paper, section 4, "ImageNet": 90 epochs, the learning rate divided by 10 after 30
    and 60.
    Command: stochastic-depth train imagenet-resnet152 --data.root DIR
    Published: validation error 23.38 % after 90 epochs, 21.78 % when trained for 120.
    Cost: 90 epochs of 1,281,167 images.
    """
    return Config(
        recipe="imagenet-resnet152",
        data=DataConfig(name="imagenet", workers=12),
        model=ModelConfig(kind="imagenet-resnet", depth=152),
        survival=SurvivalConfig(rule="linear", final=0.5),
        optimizer=OptimizerConfig(milestones=(1 / 3, 2 / 3)),
        epochs=90,
    )


def imagenet_resnet152_constant() -> Config:
    """ResNet-152 on ImageNet, constant depth: validation error 23.06 %.

    Source: the paper, section 4, "ImageNet".
    Command: stochastic-depth train imagenet-resnet152-constant --data.root DIR
    Published: validation error 23.06 %.
    Cost: 90 epochs of 1,281,167 images.
    """
    return replace(constant_depth(imagenet_resnet152()), recipe="imagenet-resnet152-constant")


def imagenet_resnet50() -> Config:
    """ResNet-50 on ImageNet, linear decay from 1 to 0.5.

    Source: ours; the schedule of imagenet-resnet152 on the most used residual network.
    Command: stochastic-depth train imagenet-resnet50 --data.root DIR
    Published: none. Shallow networks profit less: take --survival.final 0.8 for a milder decay.
    Cost: 90 epochs of 1,281,167 images.
    """
    return replace(
        imagenet_resnet152(),
        recipe="imagenet-resnet50",
        model=ModelConfig(kind="imagenet-resnet", depth=50),
    )
