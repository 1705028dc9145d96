"""A recipe for each number of the papers, and what was published for it."""

from dataclasses import dataclass, replace

from stochastic_depth.train.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SurvivalConfig,
)


def constant_depth(config: Config) -> Config:
    """`config` without stochastic depth: every block in every step."""
    return replace(config, survival=replace(config.survival, rule="constant"))


def gatings(config: Config) -> dict[str, Config]:
    """`config` with every gating at equal rates, and at constant depth, by name."""
    survival = replace(
        config.survival, gate="batch", balance=False, closed="skipped", schedule=ScheduleConfig()
    )
    early = ScheduleConfig("early", until=0.5)
    rounded = replace(survival, gate="subset", balance=True)  # it opens a rounded share, not p_l
    variants = {
        "batch": survival,
        "sample": replace(survival, gate="sample"),
        "subset": replace(survival, gate="subset"),
        "balanced-batch": replace(survival, balance=True),
        "balanced-subset": replace(rounded, scale="training"),
        "forward-only": replace(survival, closed="forward-only", scale=None),
        "early": replace(survival, schedule=early),
    }
    return {
        "constant": constant_depth(config),
        **{name: replace(config, survival=variant) for name, variant in variants.items()},
    }


@dataclass(frozen=True)
class Published:
    """One published result."""

    error: float
    """Percent."""
    source: str
    seconds: float | None = None
    """Seconds of training on the authors' GPU."""
    of: str = "test error"
    """What `error` is."""
    note: str = ""
    """What else to know about it."""

    def __str__(self) -> str:
        return f"{self.of} {self.error:.2f} %"


PAPER = "Huang et al. 2016"
DENSENET = "Huang et al. 2017"


def _time(hours: int, minutes: int) -> float:
    return 60.0 * (60 * hours + minutes)


PUBLISHED = {
    "cifar10-resnet110": Published(5.23, PAPER, _time(15, 7)),
    "cifar10-resnet110-constant": Published(6.41, PAPER, _time(20, 42)),
    "cifar100-resnet110": Published(24.58, PAPER, _time(15, 20)),
    "cifar100-resnet110-constant": Published(27.22, PAPER, _time(20, 51)),
    "svhn-resnet152": Published(1.75, PAPER, _time(25, 33)),
    "svhn-resnet152-constant": Published(2.01, PAPER, _time(33, 43)),
    "cifar10-resnet1202": Published(4.91, PAPER),
    "cifar10-resnet1202-constant": Published(6.72, PAPER),
    "imagenet-resnet152": Published(23.38, PAPER, of="validation error", note=" after 90 epochs"),
    "imagenet-resnet152-constant": Published(
        23.06, PAPER, of="validation error", note=" after 90 epochs"
    ),
    "cifar10-densenet-bc100": Published(4.51, DENSENET),
    "cifar100-densenet-bc100": Published(22.27, DENSENET),
    "cifar10-densenet-bc190": Published(3.46, DENSENET),
}
"""Published results by the name of the recipe; `describe_recipe` adds them to its docstring."""


def cifar10_resnet110() -> Config:
    """ResNet-110 on CIFAR-10, stochastic depth.

    Source: the paper, table 1 (CIFAR10+) and table 2 (15 h 7 min).
    Command: stochastic-depth train cifar10-resnet110 --data.root DIR
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
    """ResNet-110 on CIFAR-10, constant depth.

    Source: the paper, table 1 (CIFAR10+) and table 2 (20 h 42 min).
    Command: stochastic-depth train cifar10-resnet110-constant --data.root DIR
    Cost: 500 epochs of 45,000 images; the authors' GPU took 20 h 42 min.
    """
    return replace(constant_depth(cifar10_resnet110()), recipe="cifar10-resnet110-constant")


def cifar100_resnet110() -> Config:
    """ResNet-110 on CIFAR-100, stochastic depth.

    Source: the paper, table 1 (CIFAR100+) and table 2 (15 h 20 min).
    Command: stochastic-depth train cifar100-resnet110 --data.root DIR
    Cost: as cifar10-resnet110.
    """
    return replace(
        cifar10_resnet110(), recipe="cifar100-resnet110", data=DataConfig(name="cifar100")
    )


def cifar100_resnet110_constant() -> Config:
    """ResNet-110 on CIFAR-100, constant depth.

    Source: the paper, table 1 (CIFAR100+) and table 2 (20 h 51 min).
    Command: stochastic-depth train cifar100-resnet110-constant --data.root DIR
    Cost: as cifar10-resnet110-constant.
    """
    return replace(constant_depth(cifar100_resnet110()), recipe="cifar100-resnet110-constant")


def cifar10_resnet1202() -> Config:
    """ResNet-1202 on CIFAR-10, stochastic depth.

    Source: the paper, section 4, "Training a 1202-layer ResNet": 300 epochs, the first 10 at a
    learning rate of 0.01.
    Command: stochastic-depth train cifar10-resnet1202 --data.root DIR
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
    """ResNet-1202 on CIFAR-10, constant depth.

    Source: the paper, section 4, "Training a 1202-layer ResNet".
    Command: stochastic-depth train cifar10-resnet1202-constant --data.root DIR
    Cost: 300 epochs of 45,000 images, each 11 times the FLOPs of ResNet-110.
    """
    return replace(constant_depth(cifar10_resnet1202()), recipe="cifar10-resnet1202-constant")


def cifar10_densenet_bc100() -> Config:
    """DenseNet-BC-100 (k = 12) on CIFAR-10.

    The follow-up paper makes explicit the connections that dropped blocks make implicit: each layer
    reads all earlier ones. It has no residual units, so its depth is constant.

    Source: Huang et al. 2017 (arXiv:1608.06993), section 4.2 and table 2 (C10+).
    Command: stochastic-depth train cifar10-densenet-bc100 --data.root DIR
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
    """DenseNet-BC-100 (k = 12) on CIFAR-100.

    Source: Huang et al. 2017 (arXiv:1608.06993), section 4.2 and table 2 (C100+).
    Command: stochastic-depth train cifar100-densenet-bc100 --data.root DIR
    Cost: as cifar10-densenet-bc100.
    """
    return replace(
        cifar10_densenet_bc100(), recipe="cifar100-densenet-bc100", data=DataConfig(name="cifar100")
    )


def cifar10_densenet_bc190() -> Config:
    """DenseNet-BC-190 (k = 40) on CIFAR-10.

    Source: Huang et al. 2017 (arXiv:1608.06993), section 4.2 and table 2 (C10+).
    Command: stochastic-depth train cifar10-densenet-bc190 --data.root DIR
    Cost: 300 epochs of 45,000 images in batches of 64; 25.6 M parameters.
    """
    return replace(
        cifar10_densenet_bc100(),
        recipe="cifar10-densenet-bc190",
        model=ModelConfig(kind="densenet", depth=190, growth=40),
    )


def svhn_resnet152() -> Config:
    """ResNet-152 on SVHN, stochastic depth.

    Source: the paper, table 1 (SVHN) and table 2 (25 h 33 min).
    Command: stochastic-depth train svhn-resnet152 --data.root DIR
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
    """ResNet-152 on SVHN, constant depth.

    Source: the paper, table 1 (SVHN) and table 2 (33 h 43 min).
    Command: stochastic-depth train svhn-resnet152-constant --data.root DIR
    Cost: 50 epochs of 598,388 images; the authors' GPU took 33 h 43 min.
    """
    return replace(constant_depth(svhn_resnet152()), recipe="svhn-resnet152-constant")


def imagenet_resnet152() -> Config:
    """ResNet-152 on ImageNet, stochastic depth.

    Source: the paper, section 4, "ImageNet": 90 epochs, the learning rate divided by 10 after 30
    and 60.
    Command: stochastic-depth train imagenet-resnet152 --data.root DIR
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
    """ResNet-152 on ImageNet, constant depth.

    Source: the paper, section 4, "ImageNet".
    Command: stochastic-depth train imagenet-resnet152-constant --data.root DIR
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
