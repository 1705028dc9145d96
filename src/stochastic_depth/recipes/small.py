"""Recipes for small data: the embedded digits, CIFAR-10 made small, pictures of your own."""

from dataclasses import replace

from stochastic_depth.recipes.paper import constant_depth
from stochastic_depth.train.config import Config, DataConfig, ModelConfig, OptimizerConfig


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


def cifar10_small() -> Config:
    """ResNet-38 on 5,000 images of CIFAR-10 at 16x16, stochastic depth.

    No augmentation, so that there is something to overfit: at constant depth the training loss ends
    near zero.

    Source: ours; the paper's optimisation in batches of 64 on a fixed part of its training images.
    Command: stochastic-depth train cifar10-small --data.root DIR
    Published: none. Expected: a test error of about 40 %.
    Cost: 40 epochs of 5,000 images, about 2 minutes on one core.
    """
    return Config(
        recipe="cifar10-small",
        data=DataConfig(name="cifar10", validation=1_000, train=5_000, size=16, augment=False),
        model=ModelConfig(kind="cifar-resnet", depth=38),
        optimizer=OptimizerConfig(batch=64),
        epochs=40,
        evaluate_every=5 * 79,  # an evaluation reads 11,000 images, an epoch 5,000
    )


def cifar10_small_constant() -> Config:
    """ResNet-38 on 5,000 images of CIFAR-10 at 16x16, constant depth.

    Source: ours; the paper's optimisation in batches of 64 on a fixed part of its training images.
    Command: stochastic-depth train cifar10-small-constant --data.root DIR
    Published: none. Expected: a test error of about 44 %.
    Cost: 40 epochs of 5,000 images, 2 to 3 minutes on one core.
    """
    return replace(constant_depth(cifar10_small()), recipe="cifar10-small-constant")


def cifar10_small_vit() -> Config:
    """A vision transformer of 6 blocks on the images of cifar10-small, stochastic depth.

    Source: ours; each of the 12 residual units has a gate.
    Command: stochastic-depth train cifar10-small-vit --data.root DIR
    Published: none. Expected: a test error of about 50 %.
    Cost: 40 epochs of 5,000 images, about 2 minutes on one core.
    """
    return replace(
        cifar10_small(),
        recipe="cifar10-small-vit",
        model=ModelConfig(kind="vit", depth=6),
        optimizer=OptimizerConfig(
            learning_rate=0.03, batch=64, warmup_epochs=1, warmup_rate=0.01, weight_decay=1e-3
        ),
    )


def pictures() -> Config:
    """ResNet-56 on your own pictures at 64x64, stochastic depth.

    The pictures are in train/<class>/ and val/<class>/ of --data.root, of any size. The error is
    that of val; --data.validation N holds out N training images to choose the best epoch by.

    Source: ours; the network and optimisation of the paper in batches of 64.
    Command: stochastic-depth train pictures --data.root DIR
    Published: none. Expected: depends on the pictures.
    Cost: depends on their number.
    """
    return Config(
        recipe="pictures",
        data=DataConfig(name="folder", size=64),
        model=ModelConfig(kind="cifar-resnet", depth=56),
        optimizer=OptimizerConfig(batch=64),
        epochs=40,
    )
