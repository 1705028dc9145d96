"""CIFAR ResNets with the masks of timm and torchvision, which compute a branch, then mask it."""

from collections.abc import Callable

from torch import nn

from stochastic_depth.bench.peers.names import CONSTANT, OURS
from stochastic_depth.bench.plain import PlainResNet, copy_weights
from stochastic_depth.bench.workload import Step, Workload
from stochastic_depth.errors import MissingExtraError
from stochastic_depth.models import CifarResNet
from stochastic_depth.models.published import library
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay, survival_probabilities

TUTORIAL = "constant depth, float32, default layout"


def cifar_resnet_peers(
    depth: int, rate: float, workload: Workload
) -> tuple[dict[str, Step], dict[str, str]]:
    """A training step of each peer, all from the same weights, and why others are missing.

    Args:
        depth: of the CIFAR ResNet.
        rate: 1 - p_L of linear decay, for all of them.
    """
    linear_decay = LinearDecay(1 - rate)
    ours = CifarResNet(depth, channels=workload.channels)
    rates = [1 - p for p in survival_probabilities(linear_decay, (depth - 2) // 2)]
    steps: dict[str, Step] = {}
    missing: dict[str, str] = {}
    masks: dict[str, Callable[[], list[nn.Module]]] = {
        "timm DropPath": lambda: [library("timm.layers").DropPath(rate) for rate in rates],
        "torchvision StochasticDepth": lambda: [
            library("torchvision.ops").StochasticDepth(rate, "row") for rate in rates
        ],
    }
    if workload.execution.engine != "eager":
        constant = CifarResNet(depth, channels=workload.channels)
        copy_weights(ours, constant)
        steps[f"{CONSTANT}, {workload.execution.engine} engine"] = workload.engine_step(constant)
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
    if workload.execution.engine != "eager":
        by_autograd = CifarResNet(depth, channels=workload.channels)
        copy_weights(ours, by_autograd)
        apply(by_autograd, linear_decay)
        steps[f"{OURS}, eager engine"] = workload.step(by_autograd)
    steps[OURS] = workload.engine_step(ours, linear_decay)
    return steps, missing
