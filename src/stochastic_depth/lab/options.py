"""The options of analyses and benchmarks: their defaults, and which values are errors.

The command line reads this before anything is measured, so nothing here imports PyTorch. `check`
raises an error for wrong values, which names the option as on the command line.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from stochastic_depth.choices import EngineOption, PrecisionOption
from stochastic_depth.errors import ConfigError
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train.checks import at_least, check_probability, check_that
from stochastic_depth.train.config import Config

DEPTHS = (20, 56, 110, 218, 434, 866, 1202)
"""Layers of the networks of `bench depth`."""


def check_layers(option: str, layers: int) -> None:
    """Raise a ConfigError if no CIFAR ResNet has so many layers."""
    check_that(layers >= 8 and layers % 6 == 2, option, layers, "6n + 2: 8, 14, 20, 26, ...")


def check_gatings(names: Iterable[str]) -> None:
    """Raise a ConfigError for a name that is not one of `recipes.paper.gatings`."""
    known = gatings(Config())
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no gating {name!r}: choose among {', '.join(known)}")


NetworkName = Literal["cifar-resnet", "vit-small", "convnext-tiny", "x-transformer"]


@dataclass(frozen=True)
class PruningOptions:
    """How pruned networks are measured, and on how many images."""

    points: int = 19
    """How many numbers of removed blocks to measure, evenly from none to all."""
    choose_on: int = 500
    """How many validation images, evenly spread, choose the blocks that are needed least."""
    recalibrate_on: int = 2000
    """How many training images BatchNorm is recalibrated on, augmented as in training: whole
    mini-batches from the start of the first epoch."""
    batch: int = 128
    """Images in the batch that is timed, at most those of one batch of evaluation (500, or 250 of
    pictures in folders)."""
    repeats: int = 5
    """How many rounds are timed."""

    def check(self) -> None:
        at_least(1, choose_on=self.choose_on, batch=self.batch)
        at_least(2, points=self.points, recalibrate_on=self.recalibrate_on, repeats=self.repeats)


@dataclass(frozen=True)
class BenchOptions:
    """Options of every benchmark."""

    repeats: int = 20
    """How many rounds are timed, each of one step of every alternative."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the result as JSON here."""

    def check(self) -> None:
        at_least(2, repeats=self.repeats)  # quartiles need two rounds


@dataclass(frozen=True)
class StepOptions(BenchOptions):
    """A benchmark of training steps in this process."""

    device: str = "auto"
    """cpu or cuda (auto: a GPU if there is one)."""
    precision: PrecisionOption = "auto"
    """The precision of convolutions and matrix products."""


@dataclass(frozen=True)
class EngineOptions(StepOptions):
    """A benchmark whose steps are taken by the engine that is asked for."""

    engine: EngineOption = "auto"
    """The engine of our own training steps, as for train; all other steps use autograd."""


@dataclass(frozen=True)
class ImageOptions(StepOptions):
    """A benchmark of training steps on random images."""

    batch: int = 128
    """Images in a step."""
    size: int = 32
    """The height and width of the images, in pixels."""

    def check(self) -> None:
        super().check()
        at_least(2, batch=self.batch)
        at_least(4, size=self.size)


@dataclass(frozen=True)
class ResNetOptions(ImageOptions):
    """A benchmark of training steps of one CIFAR ResNet."""

    depth: int = 110
    """Layers of the CIFAR ResNet."""

    def check(self) -> None:
        super().check()
        check_layers("--depth", self.depth)


@dataclass(frozen=True)
class OverheadOptions(ResNetOptions):
    """What the library costs with all gates open."""

    repeats: int = 50
    """Rounds, each of one step of every alternative."""


@dataclass(frozen=True)
class SkipOptions(ResNetOptions, EngineOptions):
    """Time against the share of FLOPs that is spent."""


@dataclass(frozen=True)
class GatesOptions(ImageOptions):
    """Time, FLOPs and memory of a step, by each way of gating."""

    network: str = "cifar-resnet"
    """cifar-resnet, vit (the vision transformer of the recipes), timm/NAME, or transformers/TYPE
    (a language model)."""
    depth: int | None = None
    """Layers of cifar-resnet (none: 110), or blocks of vit (none: 6)."""
    gatings: tuple[str, ...] = tuple(gatings(Config()))
    """Ways of gating, relative to constant depth."""
    final: float = 0.5
    """p_L of linear decay."""
    lora: tuple[str, ...] = ()
    """Names of layers that get adapters of peft, beside frozen weights (none: train all)."""
    batch: int = 128
    """Images or texts in a step."""
    size: int = 32
    """The height and width of the images in pixels, or tokens in a text."""

    def check(self) -> None:
        super().check()
        check_probability("--final", self.final)
        check_gatings(self.gatings)
        ours = self.network in ("cifar-resnet", "vit")
        if not ours and self.network.partition("/")[0] not in ("timm", "transformers"):
            raise ConfigError(
                f"--network is {self.network}: give cifar-resnet, vit, timm/NAME or "
                "transformers/TYPE"
            )
        if self.depth is not None and not ours:
            raise ConfigError(f"--depth is not for {self.network}, which has its own: leave it out")
        if self.depth is not None and self.network == "cifar-resnet":
            check_layers("--depth", self.depth)
        at_least(1, depth=self.depth)


@dataclass(frozen=True)
class PeersOptions(EngineOptions):
    """The same network, as this library and as other libraries train it."""

    network: NetworkName = "cifar-resnet"
    """CIFAR ResNet, timm's ViT-S/16 or ConvNeXt-T, or a GPT of x-transformers (384 wide, 6
    layers)."""
    depth: int = 110
    """Layers of the CIFAR ResNet."""
    rate: float | None = None
    """Drop rate of the last block, 1 - p_L and timm's drop_path_rate; of every block for
    x-transformer (none: 0.5 for cifar-resnet, 0.3 for others)."""
    batch: int | None = None
    """Images or texts in a step (none: 128 for cifar-resnet, 16 for others)."""
    size: int | None = None
    """The height and width of the images in pixels, or tokens in a text (none: 32 for cifar-resnet,
    128 for others)."""

    def check(self) -> None:
        super().check()
        check_layers("--depth", self.depth)
        at_least(2, batch=self.batch)
        at_least(4, size=self.size)
        if self.engine not in ("auto", "eager") and self.network != "cifar-resnet":
            raise ConfigError(
                f"--engine is {self.engine}: autograd takes the steps of {self.network}, leave "
                "it out"
            )
        if self.rate is not None and not 0 <= self.rate < 1:
            raise ConfigError(f"--rate is {self.rate}: a drop rate is at least 0 and below 1")


@dataclass(frozen=True)
class DepthOptions(ImageOptions, EngineOptions):
    """Time and memory against depth, for constant and stochastic depth."""

    deepest: int = 1202
    """The depth of the last CIFAR ResNet. Those of 20, 56, 110, 218, 434, 866 and 1202 layers come
    before it."""
    repeats: int = 10
    """How many rounds are timed, each of one step of every alternative."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Draw a picture as PNG here."""

    def check(self) -> None:
        super().check()
        if self.deepest <= DEPTHS[0]:  # through one depth no line can be fitted
            raise ConfigError(
                f"--deepest is {self.deepest}: the first depth is {DEPTHS[0]}, it must be above"
            )
        check_layers("--deepest", self.deepest)


@dataclass(frozen=True)
class EnginesOptions(ResNetOptions):
    """Autograd, compiled blocks and the block program, side by side."""


@dataclass(frozen=True)
class DistributedOptions(BenchOptions):
    """How much several processes on this CPU send each other, and how long they take (gloo)."""

    ranks: tuple[int, ...] = (2, 4)
    """Numbers of processes."""
    depth: int = 110
    """Layers of the CIFAR ResNet."""
    batch: int = 32
    """Images in a step, of all processes together."""
    size: int = 32
    """The height and width of the images, in pixels."""

    def check(self) -> None:
        super().check()
        check_layers("--depth", self.depth)
        at_least(4, size=self.size)
        if not self.ranks:
            raise ConfigError("--ranks names no number of processes: give one or several")
        for ranks in self.ranks:
            if ranks < 2 or self.batch < 2 * ranks or self.batch % ranks:
                raise ConfigError(
                    f"--ranks is {ranks} and --batch {self.batch}: at least 2 processes, of "
                    "equally many images, at least 2 each"
                )


@dataclass(frozen=True)
class ProfileOptions(ResNetOptions, EngineOptions):
    """Where the time of a step at constant depth goes."""

    engine: Literal["auto", "eager", "program"] = "auto"
    """Time the operators of autograd alone (eager), or the pieces of the block program too
    (program)."""
