"""Time the same network as this library and as other libraries train it.

The gates of this library for mini-batches are balanced, so that every step has the expected number
of open blocks: independent coins take the same time in the mean over many steps, but a benchmark
has a dozen. Those for single samples are independent; their number evens out within a step.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from stochastic_depth.choices import GateKind
from stochastic_depth.errors import ApplyError, MissingExtraError, first_line
from stochastic_depth.extras import require
from stochastic_depth.lab.bench.results import MEMORY, Rounds, table_of, time_in_turns
from stochastic_depth.lab.bench.workload import (
    PlainResNet,
    Step,
    Workload,
    copy_weights,
    step_memory,
    timm_model,
    training_step,
)
from stochastic_depth.lab.options import NetworkName, PeersOptions
from stochastic_depth.lab.titles import CONSTANT
from stochastic_depth.models import CifarResNet
from stochastic_depth.randomness import generator
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay, Uniform, survival_probabilities
from stochastic_depth.train.runtime import Runtime

OURS = "stochastic-depth"
TUTORIAL = f"{CONSTANT}, float32, default layout"
"""Constant depth as tutorials train it, whatever the precision of the other rows."""


def cifar_resnet_peers(
    depth: int, rate: float, workload: Workload
) -> tuple[dict[str, Step], dict[str, str]]:
    """A training step of each peer, all from the same weights; and why others are missing.

    Args:
        depth: the depth of the CIFAR ResNet.
        rate: the drop rate 1 - p_L of linear decay, for all of them.
    """
    linear_decay = LinearDecay(1 - rate)
    ours = CifarResNet(depth, channels=workload.channels)
    rates = [1 - p for p in survival_probabilities(linear_decay, (depth - 2) // 2)]
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    masks: dict[str, Callable[[], list[nn.Module]]] = {
        "timm DropPath": lambda: [require("timm.layers").DropPath(rate) for rate in rates],
        "torchvision StochasticDepth": lambda: [
            require("torchvision.ops").StochasticDepth(rate, "row") for rate in rates
        ],
    }
    if workload.runtime.engine != "eager":
        constant = CifarResNet(depth, channels=workload.channels)
        copy_weights(ours, constant)
        steps[f"{CONSTANT}, {workload.runtime.engine} engine"] = workload.engine_step(constant)
    for name, tutorial in ((CONSTANT, False), (TUTORIAL, True)):
        plain = PlainResNet(depth, workload.channels)
        copy_weights(ours, plain)
        steps[name] = workload.step(plain, tutorial)
    for name, drops in masks.items():
        try:
            masked = PlainResNet(depth, workload.channels, drops())
        except MissingExtraError as error:
            missing[name] = str(error)
            continue
        copy_weights(ours, masked)
        steps[name] = workload.step(masked)
    if workload.runtime.engine != "eager":
        by_autograd = CifarResNet(depth, channels=workload.channels)
        copy_weights(ours, by_autograd)
        apply(by_autograd, linear_decay, balance=True)
        steps[f"{OURS}, eager engine"] = workload.step(by_autograd)
    steps[OURS] = workload.engine_step(ours, linear_decay, balance=True)
    return steps, missing


TIMM = "timm drop path"
SUBSET = 'stochastic-depth, gate="subset"'


def timm_peers(name: str, rate: float, workload: Workload) -> dict[str, Step]:
    """A training step of each peer, all from the same weights.

    Ours takes the rates from the network's own drop paths, and divides by p_l in training as they
    do. With gate="subset" it computes what timm computes. With gate="batch" one coin decides for
    all samples.

    Args:
        name: the name of a network whose training steps depend only on the weights, the images and
            the drop path; it has no dropout.
        rate: timm's drop_path_rate, 1 - p_L.

    Raises:
        MissingExtraError: without timm.
    """
    constant = timm_model(name, workload.size)
    steps = {}
    gates: dict[str, GateKind | None] = {TIMM: None, OURS: "batch", SUBSET: "subset"}
    for peer, gate in gates.items():
        model = timm_model(name, workload.size, drop_path_rate=rate)
        copy_weights(constant, model)
        if gate is not None:
            survival = "own" if rate else Uniform(1.0)
            apply(
                model,
                survival,
                example=workload.images()[:2],
                gate=gate,
                balance=gate == "batch",
                scale="training",
            )
        steps[peer] = workload.step(model)
    return {CONSTANT: workload.step(constant), **steps}


THEIRS = "x-transformers layer_dropout"
TOKENS, DIMENSION, LAYERS, HEADS = 1000, 384, 6, 6
"""The size of the vocabulary; the width; the number of layers, each with an attention and a
feed-forward unit; and the number of heads."""


def x_transformer_peers(
    rate: float, batch: int, length: int, runtime: Runtime
) -> tuple[dict[str, Step], dict[str, str]]:
    """A training step of each peer, all from the same weights; and why others are missing.

    Args:
        rate: the drop rate of every unit.
        batch: texts in a step.
        length: tokens in a text.

    Raises:
        MissingExtraError: without x-transformers.
    """
    require("x_transformers")
    texts = torch.randint(TOKENS, (batch, length + 1), generator=generator("bench"))
    inputs, labels = texts[:, :-1], texts[:, 1:]
    rates = {CONSTANT: 0.0, THEIRS: rate, OURS: 0.0}
    models = {name: _decoder(layer_dropout, length) for name, layer_dropout in rates.items()}
    for model in models.values():
        copy_weights(models[CONSTANT], model)
    missing: dict[str, str] = {}
    try:
        survival = Uniform(1 - rate)
        apply(models[OURS], survival, example=inputs[:2], granularity="unit", balance=True)
    except ApplyError as error:
        missing[OURS] = first_line(error)
        del models[OURS]
    steps = {name: training_step(model, inputs, labels, runtime) for name, model in models.items()}
    return steps, missing


def _decoder(layer_dropout: float, length: int) -> torch.nn.Module:
    package = require("x_transformers")
    layers = package.Decoder(dim=DIMENSION, depth=LAYERS, heads=HEADS, layer_dropout=layer_dropout)
    return package.TransformerWrapper(num_tokens=TOKENS, max_seq_len=length, attn_layers=layers)


@dataclass(frozen=True)
class PeerNetwork:
    """Default sizes for timing a network: small enough for a CPU."""

    batch: int
    size: int
    """The height and width of the images in pixels, or tokens in a text."""
    rate: float
    """The drop rate of the last block."""
    libraries: tuple[str, ...]
    """The packages in which its peers are."""
    unit: Literal["images", "tokens"] = "images"


PEERS: dict[NetworkName, PeerNetwork] = {
    "cifar-resnet": PeerNetwork(128, 32, 0.5, ("timm", "torchvision")),
    "vit-small": PeerNetwork(16, 128, 0.3, ("timm",)),
    "convnext-tiny": PeerNetwork(16, 128, 0.3, ("timm",)),
    "x-transformer": PeerNetwork(16, 128, 0.3, ("x-transformers",), "tokens"),
}


def peers(
    name: NetworkName, depth: int, rate: float, batch: int, size: int, runtime: Runtime
) -> tuple[dict[str, Step], dict[str, str]]:
    """A training step of each peer, all from the same weights; and why others are missing.

    Args:
        depth: the depth of the CIFAR ResNet.
        rate: the drop rate of the last block, 1 - p_L; for x-transformer that of every block.
        batch: images or texts in a step.
        size: the height and width of the images in pixels, or tokens in a text.

    Raises:
        MissingExtraError: without the library that the network comes from.
    """
    workload = Workload(batch, size, 3, runtime)
    match name:
        case "cifar-resnet":
            return cifar_resnet_peers(depth, rate, workload)
        case "vit-small":
            return timm_peers("vit_small_patch16_224", rate, workload), {}
        case "convnext-tiny":
            return timm_peers("convnext_tiny", rate, workload), {}
        case "x-transformer":
            return x_transformer_peers(rate, batch, size, runtime)


@dataclass(frozen=True)
class PeersResult:
    """The steps of every peer and their memory, and why others are missing."""

    timed: Rounds
    memory: Mapping[str, float]
    """Bytes, as `MEMORY` says."""
    network: PeerNetwork
    batch: int
    size: int
    rate: float
    missing: Mapping[str, str]

    @property
    def count(self) -> int:
        """Images or tokens in a step."""
        return self.batch * (self.size if self.network.unit == "tokens" else 1)

    @property
    def ours(self) -> str | None:
        """The row of this library; None if it is missing."""
        return OURS if OURS in self.timed.timings else None

    def to_json(self) -> dict[str, Any]:
        ours = self.ours
        medians = {name: timing.median for name, timing in self.timed.timings.items()}
        return {
            **self.timed.to_json(),
            "batch": self.batch,
            "size": self.size,
            "rate": self.rate,
            "libraries": {name: _version(name) for name in self.network.libraries},
            f"{self.network.unit}_per_second": {n: self.count / m for n, m in medians.items()},
            "memory_bytes": dict(self.memory),
            "memory": f"{MEMORY}; mean of 5",
            "ours_is_faster_by": {
                name: m / medians[ours] for name, m in medians.items() if ours and name != ours
            },
            "missing": dict(self.missing),
        }


def measure(options: PeersOptions, runtime: Runtime, console: Console) -> PeersResult:
    """Time a network as this library and as others train it, and measure the memory of each."""
    network = PEERS[options.network]
    rate = network.rate if options.rate is None else options.rate
    batch, size = options.batch or network.batch, options.size or network.size
    with console.status(f"building {options.network}"):
        steps, missing = peers(options.network, options.depth, rate, batch, size, runtime)
    timed = time_in_turns(steps, options.repeats, console, runtime)
    with console.status("memory"):
        memory = {name: step_memory(step, runtime.device) for name, step in steps.items()}
    return PeersResult(timed, memory, network, batch, size, rate, missing)


def tables(result: PeersResult, options: PeersOptions, runtime: Runtime) -> Iterator[Table | str]:
    of_depth = f"-{options.depth}" if options.network == "cifar-resnet" else ""
    title = (
        f"{options.network}{of_depth}, drop rate {result.rate:g}, batch {result.batch}, size "
        f"{result.size}"
    )
    timings, unit = result.timed.timings, result.network.unit
    yield table_of(title, runtime, timings, result.count, unit, result.memory, result.ours)
    yield "ours: balanced gates, the expected number of blocks in every step (not so with subsets)"
    yield f"memory: {MEMORY}; mean of 5"
    for name, reason in result.missing.items():
        yield f"{name}: {reason}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
