"""CIFAR-10 and CIFAR-100 with augmentation: the paper's table 1, and DenseNet.

Huang et al. 2016, section 4: 45,000 training and 5,000 validation images, crops and flips, SGD
with Nesterov momentum for 500 epochs in batches of 128, the learning rate 0.1 divided by 10 at half
and at three quarters of the run.
"""

from dataclasses import replace

from stochastic_depth.recipes.variant import constant_depth
from stochastic_depth.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
)


def cifar10_resnet110() -> Config:
    """ResNet-110 on CIFAR-10, stochastic depth: test error 5.23 %.

    Source: the paper, table 1 (CIFAR10+) and table 2 (15 h 7 min).
    Command: stochastic-depth train cifar10-resnet110 --data.root DIR
    Published: test error 5.23 %.
    Cost: 500 epochs of 45,000 images; the authors' GPU took 15 h 7 min.
    """
    return Config(
        recipe="cifar10-resnet110",
        data=DataConfig(name="cifar10"),
        model=ModelConfig(kind="cifar-resnet", depth=110),
        survival=SurvivalConfig(rule="linear", final=0.5),
        epochs=500,
    )


def cifar10_resnet110_constant() -> Config:
    """ResNet-110 on CIFAR-10, constant depth: test error 6.41 %.

    Source: the paper, table 1 (CIFAR10+) and table 2 (20 h 42 min).
    Command: stochastic-depth train cifar10-resnet110-constant --data.root DIR
    Published: test error 6.41 %.
    Cost: 500 epochs of 45,000 images; the authors' GPU took 20 h 42 min.
    """
    return replace(constant_depth(cifar10_resnet110()), recipe="cifar10-resnet110-constant")


def cifar100_resnet110() -> Config:
    """ResNet-110 on CIFAR-100, stochastic depth: test error 24.58 %.

    Source: the paper, table 1 (CIFAR100+) and table 2 (15 h 20 min).
    Command: stochastic-depth train cifar100-resnet110 --data.root DIR
    Published: test error 24.58 %.
    Cost: as cifar10-resnet110.
    """
    return replace(
        cifar10_resnet110(), recipe="cifar100-resnet110", data=DataConfig(name="cifar100")
    )


def cifar100_resnet110_constant() -> Config:
    """ResNet-110 on CIFAR-100, constant depth: test error 27.22 %.

    Source: the paper, table 1 (CIFAR100+) and table 2 (20 h 51 min).
    Command: stochastic-depth train cifar100-resnet110-constant --data.root DIR
    Published: test error 27.22 %.
    Cost: as cifar10-resnet110-constant.
    """
    return replace(constant_depth(cifar100_resnet110()), recipe="cifar100-resnet110-constant")


def cifar10_resnet1202() -> Config:
    """ResNet-1202 on CIFAR-10, stochastic depth: test error 4.91 %.

    Source: the paper, section 4, "Training a 1202-layer ResNet": 300 epochs, the first 10 at a
    learning rate of 0.01.
    Command: stochastic-depth train cifar10-resnet1202 --data.root DIR
    Published: test error 4.91 %.
    Cost: 300 epochs of 45,000 images, each 11 times the FLOPs of ResNet-110.
    """
    return replace(
        cifar10_resnet110(),
        recipe="cifar10-resnet1202",
        model=ModelConfig(kind="cifar-resnet", depth=1202),
        optimizer=OptimizerConfig(warmup_epochs=10, warmup_rate=0.01),
        epochs=300,
    )


def cifar10_resnet1202_constant() -> Config:
    """ResNet-1202 on CIFAR-10, constant depth: test error 6.72 %.

    Source: the paper, section 4, "Training a 1202-layer ResNet".
    Command: stochastic-depth train cifar10-resnet1202-constant --data.root DIR
    Published: test error 6.72 %.
    Cost: 300 epochs of 45,000 images, each 11 times the FLOPs of ResNet-110.
    """
    return replace(constant_depth(cifar10_resnet1202()), recipe="cifar10-resnet1202-constant")


def cifar10_densenet_bc100() -> Config:
    """DenseNet-BC-100 (k = 12) on CIFAR-10: test error 4.51 %.

    The follow-up, in which the connections that dropped blocks make implicit are explicit: each
    layer sees all before it. It has no residual units, so its depth is constant.

    Source: Huang et al. 2017 (arXiv:1608.06993), section 4.2 and table 2 (C10+).
    Command: stochastic-depth train cifar10-densenet-bc100 --data.root DIR
    Published: test error 4.51 %.
    Cost: 300 epochs of 45,000 images in batches of 64.
    """
    return Config(
        recipe="cifar10-densenet-bc100",
        data=DataConfig(name="cifar10"),
        model=ModelConfig(kind="densenet", depth=100, growth=12),
        survival=SurvivalConfig(rule="constant"),
        optimizer=OptimizerConfig(batch=64),
        epochs=300,
    )


def cifar100_densenet_bc100() -> Config:
    """DenseNet-BC-100 (k = 12) on CIFAR-100: test error 22.27 %.

    Source: Huang et al. 2017 (arXiv:1608.06993), section 4.2 and table 2 (C100+).
    Command: stochastic-depth train cifar100-densenet-bc100 --data.root DIR
    Published: test error 22.27 %.
    Cost: as cifar10-densenet-bc100.
    """
    return replace(
        cifar10_densenet_bc100(), recipe="cifar100-densenet-bc100", data=DataConfig(name="cifar100")
    )


def cifar10_densenet_bc190() -> Config:
    """DenseNet-BC-190 (k = 40) on CIFAR-10: test error 3.46 %.

    Source: Huang et al. 2017 (arXiv:1608.06993), section 4.2 and table 2 (C10+).
    Command: stochastic-depth train cifar10-densenet-bc190 --data.root DIR
    Published: test error 3.46 %.
    Cost: 300 epochs of 45,000 images in batches of 64; 25.6 M parameters.
    """
    return replace(
        cifar10_densenet_bc100(),
        recipe="cifar10-densenet-bc190",
        model=ModelConfig(kind="densenet", depth=190, growth=40),
    )
