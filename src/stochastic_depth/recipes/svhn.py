"""Street view house numbers: the paper's table 1, SVHN.

Huang et al. 2016, section 4: 6,000 of the training and extra images held out for validation, no
augmentation, 50 epochs, the learning rate divided by 10 after 30 and 35, evaluated every 200
iterations.
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


def svhn_resnet152() -> Config:
    """ResNet-152 on SVHN, stochastic depth: test error 1.75 %.

    Source: the paper, table 1 (SVHN) and table 2 (25 h 33 min).
    Command: stochastic-depth train svhn-resnet152 --data.root DIR
    Published: test error 1.75 %.
    Cost: 50 epochs of 598,388 images; the authors' GPU took 25 h 33 min.
    """
    return Config(
        recipe="svhn-resnet152",
        data=DataConfig(name="svhn"),
        model=ModelConfig(kind="cifar-resnet", depth=152),
        survival=SurvivalConfig(rule="linear", final=0.5),
        optimizer=OptimizerConfig(milestones=(0.6, 0.7)),
        epochs=50,
        evaluate_every=200,
    )


def svhn_resnet152_constant() -> Config:
    """ResNet-152 on SVHN, constant depth: test error 2.01 %.

    Source: the paper, table 1 (SVHN) and table 2 (33 h 43 min).
    Command: stochastic-depth train svhn-resnet152-constant --data.root DIR
    Published: test error 2.01 %.
    Cost: 50 epochs of 598,388 images; the authors' GPU took 33 h 43 min.
    """
    return replace(constant_depth(svhn_resnet152()), recipe="svhn-resnet152-constant")
