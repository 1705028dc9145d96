"""The embedded data: a run of seconds that shows everything the long ones do."""

from dataclasses import replace

from stochastic_depth.recipes.variant import constant_depth
from stochastic_depth.train.config import Config, DataConfig, ModelConfig


def digits() -> Config:
    """ResNet-110 on scikit-learn's 8x8 digits, stochastic depth.

    Source: ours; the network and optimisation of the paper on 1,197 training images.
    Command: stochastic-depth train digits
    Published: none. Expected: a test error of about 1 %.
    Cost: 15 to 20 seconds of training on two cores.
    """
    return Config(
        recipe="digits",
        data=DataConfig(name="digits"),
        model=ModelConfig(kind="cifar-resnet", depth=110),
        epochs=20,
        precision="float32",  # 8x8 images are too small for bfloat16 to gain anything
    )


def digits_constant() -> Config:
    """ResNet-110 on scikit-learn's 8x8 digits, constant depth.

    Source: ours; the network and optimisation of the paper on 1,197 training images.
    Command: stochastic-depth train digits-constant
    Published: none. Expected: a test error of about 1 %.
    Cost: 19 to 26 seconds of training on two cores.
    """
    return replace(constant_depth(digits()), recipe="digits-constant")
