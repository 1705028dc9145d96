"""The configuration of a run: frozen dataclasses, used on the command line and in JSON."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from stochastic_depth.choices import (
    Closed,
    DataName,
    EngineOption,
    GateKind,
    Initialisation,
    PrecisionOption,
    RuleName,
    SkippedPolicy,
)
from stochastic_depth.errors import ConfigError
from stochastic_depth.train.checks import check_probability, check_that, finite, positive
from stochastic_depth.train.plain_json import plain, restore
from stochastic_depth.train.schedule_config import ScheduleConfig


@dataclass(frozen=True)
class DataConfig:
    """The data set and its images."""

    name: DataName = "digits"
    """The data set. digits is embedded, the others are read from `root`. For your own pictures use
    folder, which reads train/<class>/ and val/<class>/."""
    root: Path | None = None
    """The folder of the data set, in any of its public layouts."""
    validation: int | None = None
    """How many training images are held out for validation (none: 5,000 for CIFAR, 6,000 for SVHN,
    100 for digits, 0 for folders of pictures)."""
    train: int | None = None
    """Train on a fixed random subset of this many images (none: all images)."""
    size: int | None = None
    """Reduce the images to this many pixels a side (none: their own size, or 224 for folders
    of pictures)."""
    augment: bool | None = None
    """Randomly crop and flip the training images (none: those of all data sets but SVHN and
    digits)."""
    download: bool = False
    """Fetch the data set into `root` if it is not there."""
    workers: int = 4
    """Processes that decode pictures, at most one for each core; results do not depend on their
    number."""

    def __post_init__(self) -> None:
        for name in ("validation", "train", "size"):
            positive(f"data.{name}", getattr(self, name))
        check_that(0 <= self.workers <= 1024, "data.workers", self.workers, "0 to 1024")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    kind: Literal["cifar-resnet", "imagenet-resnet", "densenet", "vit"] = "cifar-resnet"
    """Family of networks."""
    depth: int = 110
    """Weighted layers: 6n + 2 for a CIFAR ResNet, and 50, 101 or 152 for an ImageNet ResNet. For a
    vit, the number of transformer blocks, each with an attention and an MLP."""
    init: Initialisation = "zero-gain"
    """Start every block as its shortcut (zero-gain), or as in the original papers (he)."""
    growth: int = 12
    """DenseNet only: channels that each layer adds."""
    bottleneck: bool = True
    """DenseNet only: the BC variant, with bottlenecks and compression by half."""

    def __post_init__(self) -> None:
        check_that(1 <= self.depth <= 100_000, "model.depth", self.depth, "1 to 100,000")
        check_that(1 <= self.growth <= 10_000, "model.growth", self.growth, "1 to 10,000")


@dataclass(frozen=True)
class SurvivalConfig:
    """Which blocks are dropped in training."""

    rule: RuleName = "linear"
    """Linear decay from 1 to `final`; `final` for all blocks (uniform); or no stochastic depth
    (constant)."""
    final: float = 0.5
    """p_L, the survival probability of the last block."""
    gate: GateKind = "batch"
    """Throw a coin for each mini-batch (batch: skips), or for each sample (sample: masks; subset:
    runs the branch on the drawn samples)."""
    balance: bool = False
    """Open a constant number of blocks in each step, or of samples in each block."""
    closed: Closed = "skipped"
    """What a closed block saves: all of its branch, or only the backward pass."""
    scale: Literal["inference", "training"] | None = None
    """Multiply by p_l in evaluation (the default), or divide by it in training."""
    skipped: SkippedPolicy = "paper"
    """The gradient of the parameters of a skipped block: zero, so that momentum and weight decay
    still apply (paper), or None, so that they stay as they are (freeze)."""
    schedule: Annotated[ScheduleConfig, tyro.conf.arg(name="schedule", prefix_name=False)] = field(
        default_factory=ScheduleConfig
    )

    def __post_init__(self) -> None:
        check_probability("survival.final", self.final)
        finite("survival", self)
        if self.closed == "forward-only" and (self.gate != "batch" or self.scale is not None):
            raise ConfigError(
                "survival.closed is forward-only, which needs the batch gate and has no scale: "
                "leave out --survival.gate and --survival.scale"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """Stochastic gradient descent, and its learning rate over time."""

    learning_rate: float = 0.1
    """The learning rate at the start."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Fractions of the run at which the learning rate is divided by `divisor`."""
    divisor: float = 10.0
    """The learning rate is divided by this number at each milestone."""
    warmup_epochs: float = 0.0
    """How many epochs to train with `warmup_rate` before `learning_rate`."""
    warmup_rate: float = 0.01
    """The learning rate of the warm-up."""
    momentum: float = 0.9
    """The coefficient of Nesterov momentum (0: plain gradient descent)."""
    weight_decay: float = 1e-4
    """The coefficient of the L2 penalty on every parameter."""
    batch: int = 128
    """Images in a mini-batch."""

    def __post_init__(self) -> None:
        check_that(self.learning_rate > 0, "optimizer.learning-rate", self.learning_rate, "above 0")
        check_that(self.divisor > 0, "optimizer.divisor", self.divisor, "above 0")
        check_that(
            0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "at least 0 and below 1"
        )
        check_that(
            self.weight_decay >= 0, "optimizer.weight-decay", self.weight_decay, "at least 0"
        )
        check_that(
            self.warmup_epochs >= 0, "optimizer.warmup-epochs", self.warmup_epochs, "at least 0"
        )
        check_that(self.warmup_rate > 0, "optimizer.warmup-rate", self.warmup_rate, "above 0")
        check_that(self.batch >= 2, "optimizer.batch", self.batch, "at least 2 (BatchNorm)")
        positive("optimizer.batch", self.batch)
        for milestone in self.milestones:
            check_that(0 < milestone < 1, "optimizer.milestones", milestone, "above 0 and below 1")
        finite("optimizer", self)


@dataclass(frozen=True)
class DistributedConfig:
    """What several processes share; without effect in a single process."""

    sync_batchnorm: bool = False
    """Normalise over the images of all processes together, instead of each process separately."""
    rank_gates: bool = False
    """Each process draws its own gates. Then all gradients are sent, and all wait for the
    deepest."""

    def __post_init__(self) -> None:
        if self.sync_batchnorm and self.rank_gates:
            raise ConfigError(
                "distributed.sync-batchnorm is True, and so is distributed.rank-gates: a block "
                "that is closed in one process cannot normalise with the others; leave one out"
            )


@dataclass(frozen=True)
class Config:
    """The configuration of one training run."""

    recipe: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "custom"
    """The name of the recipe that this configuration started from."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    survival: SurvivalConfig = field(default_factory=SurvivalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    epochs: int = 500
    """Passes over the training images."""
    seed: int = 0
    """Chooses the initial weights, the gates, the order of the images and their augmentation."""
    evaluate_every: int | None = None
    """How many steps lie between evaluations and checkpoints (none: an epoch)."""
    keep: int = 2
    """How many of the latest checkpoints to keep, besides that of the best validation error."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ... (auto: a GPU if there is one)."""
    precision: PrecisionOption = "auto"
    """The precision of convolutions and matrix products (auto: bfloat16 where the processor
    supports it)."""
    engine: EngineOption = "auto"
    """How training steps are taken: by autograd (eager), by autograd with compiled blocks
    (compiled), or by a block program (program), which is captured as CUDA graphs on a GPU and runs
    piece by piece on a CPU."""

    def __post_init__(self) -> None:
        positive("epochs", self.epochs)
        positive("evaluate-every", self.evaluate_every)
        positive("keep", self.keep)
        if self.epochs <= self.optimizer.warmup_epochs:
            raise ConfigError(
                f"optimizer.warmup-epochs is {self.optimizer.warmup_epochs:g} and epochs is "
                f"{self.epochs}: nothing would be trained at optimizer.learning-rate; give fewer "
                "--optimizer.warmup-epochs, or more --epochs"
            )
        subsets = self.survival.gate == "subset" and not self.survival.balance
        if self.distributed.sync_batchnorm and subsets:
            raise ConfigError(
                "distributed.sync-batchnorm is True, and survival.gate is subset: a process that "
                "has no sample of a subset cannot normalise with the others; leave one out, or "
                "add --survival.balance"
            )

    def without_effect(self) -> dict[str, str]:
        """The options that have no effect because of another one, and what to do about each."""
        found: dict[str, str] = {}

        def add(where: str, part: object, names: Iterable[str], why: str, instead: str) -> None:
            for name in names:
                option = f"{where}.{name.replace('_', '-')}"
                found[option] = (
                    f"{option} is {getattr(part, name)}, which has no effect where {why}: leave it "
                    f"out, or {instead}"
                )

        why, instead = f"data.name is {self.data.name}", "take a recipe of another data set"
        if self.data.name == "digits":
            add("data", self.data, ["download"], f"{why}, which is embedded", instead)
        if self.data.name not in ("imagenet", "folder"):
            add("data", self.data, ["workers"], f"{why}, which is read into memory", instead)
        kind, optimizer = f"model.kind is {self.model.kind}", self.optimizer
        if self.model.kind == "densenet":
            add("model", self.model, ["init"], kind, "take a recipe of another network")
        else:
            names = ["growth", "bottleneck"]
            add("model", self.model, names, kind, "take the recipe of a DenseNet")
        if self.model.kind == "vit":
            why = f"{kind}, which has no BatchNorm"
            names = ["sync_batchnorm"]
            add("distributed", self.distributed, names, why, "take a recipe of another network")
        if self.survival.rule == "constant":
            why = "survival.rule is constant"
            instead = "give --survival.rule linear or uniform, in a network with residual blocks"
            names = [name for name in vars(self.survival) if name not in ("rule", "schedule")]
            add("survival", self.survival, names, why, instead)
            add("distributed", self.distributed, ["rank_gates"], why, instead)
            found["schedule"] = (
                f"schedule is {self.survival.schedule.kind}, which has no effect where {why}: "
                f"leave it out, or {instead}"
            )
        if optimizer.warmup_epochs == 0:
            why, instead = "optimizer.warmup-epochs is 0", "give --optimizer.warmup-epochs"
            add("optimizer", optimizer, ["warmup_rate"], why, instead)
        if not optimizer.milestones:
            why, instead = "optimizer.milestones is empty", "give --optimizer.milestones"
            add("optimizer", optimizer, ["divisor"], why, instead)
        unused = self.survival.schedule.unused()
        return found | {f"schedule.{name}": problem for name, problem in unused.items()}

    def without_io(self) -> "Config":
        """This configuration without the fields that do not change results.

        They say where the data is, how it is read, and how many checkpoints are kept.
        """
        data = replace(self.data, root=None, workers=0, download=False)
        return replace(self, keep=1, data=data)

    def without_seed(self) -> "Config":
        """This configuration without its seed: equal for runs that differ in their seed only.

        It also leaves out `without_io`'s fields, the name of the recipe and, under constant depth,
        the survival settings, which are not used.
        """
        survival = self.survival
        if survival.rule == "constant":
            survival = SurvivalConfig(rule="constant")
        return replace(self.without_io(), recipe="", seed=0, survival=survival)

    def to_json(self) -> dict[str, Any]:
        """This configuration as plain JSON values."""
        return plain(dataclasses.asdict(self))

    @staticmethod
    def from_json(values: Any) -> "Config":
        """The configuration that `to_json` was called on.

        Raises:
            ConfigError: when a field is missing, unknown or of another type.
        """
        return restore(Config, values, "config")
