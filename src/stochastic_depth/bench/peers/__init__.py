"""The same network as others train it."""

from dataclasses import dataclass
from typing import Literal

from stochastic_depth.bench.peers.cifar_resnet import cifar_resnet_peers
from stochastic_depth.bench.peers.names import CONSTANT, OURS
from stochastic_depth.bench.peers.timm_network import timm_peers
from stochastic_depth.bench.peers.x_transformer import x_transformer_peers
from stochastic_depth.bench.workload import Step, Workload
from stochastic_depth.errors import ConfigError
from stochastic_depth.train.execution import Execution

__all__ = ["CONSTANT", "NETWORKS", "OURS", "Network", "NetworkName", "peers"]

NetworkName = Literal["cifar-resnet", "vit-small", "convnext-tiny", "x-transformer"]


@dataclass(frozen=True)
class Network:
    """How a network is timed where nothing else is asked for: small enough for a CPU."""

    batch: int
    size: int
    """Height and width of the images, pixels; or tokens a text."""
    rate: float
    """The drop rate of the last block."""
    libraries: tuple[str, ...]
    """The packages that its peers come from."""
    unit: Literal["images", "tokens"] = "images"


NETWORKS: dict[NetworkName, Network] = {
    "cifar-resnet": Network(128, 32, 0.5, ("timm", "torchvision")),
    "vit-small": Network(16, 128, 0.3, ("timm",)),
    "convnext-tiny": Network(16, 128, 0.3, ("timm",)),
    "x-transformer": Network(16, 128, 0.3, ("x-transformers",), "tokens"),
}


def peers(
    name: NetworkName, depth: int, rate: float, batch: int, size: int, execution: Execution
) -> tuple[dict[str, Step], dict[str, str]]:
    """A training step of each peer, all from the same weights, and why others are missing.

    Args:
        depth: of the CIFAR ResNet.
        rate: the drop rate of the last block, 1 - p_L; of every one for x-transformer.
        batch: images or texts a step.
        size: height and width of the images in pixels, or tokens a text.

    Raises:
        ConfigError: when the rate is none.
        MissingExtraError: without the library that the network comes from.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"rate={rate}: a drop rate is at least 0 and below 1")
    workload = Workload(batch, size, 3, execution)
    match name:
        case "cifar-resnet":
            return cifar_resnet_peers(depth, rate, workload)
        case "vit-small":
            return timm_peers("vit_small_patch16_224", rate, workload), {}
        case "convnext-tiny":
            return timm_peers("convnext_tiny", rate, workload), {}
        case "x-transformer":
            return x_transformer_peers(rate, batch, size, execution)
