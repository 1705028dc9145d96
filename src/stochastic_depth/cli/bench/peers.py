"""stochastic-depth bench peers."""

import statistics
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console

from stochastic_depth.cli.bench.options import Options
from stochastic_depth.cli.bench.output import MEMORY, shown, table_of, timings
from stochastic_depth.lab.bench.peers import CONSTANT, NETWORKS, OURS, NetworkName, peers
from stochastic_depth.lab.bench.workload import step_memory
from stochastic_depth.timing import take_turns
from stochastic_depth.train.runtime import Execution


@dataclass(frozen=True)
class Peers(Options):
    """The same network as other libraries train it."""

    network: NetworkName = "cifar-resnet"
    """CIFAR ResNet, timm's ViT-S/16 or ConvNeXt-T, or a GPT of x-transformers (384 wide, 6
    layers)."""
    depth: int = 110
    """Of the CIFAR ResNet."""
    rate: float | None = None
    """Drop rate of the last block, 1 - p_L and timm's drop_path_rate; of every block for
    x-transformer (none: 0.5 for cifar-resnet, 0.3 for others)."""
    batch: int | None = None
    """Images or texts a step (none: 128 for cifar-resnet, 16 for others)."""
    size: int | None = None
    """Height and width of the images, pixels; tokens a text (none: 32 for cifar-resnet, 128 for
    others)."""

    def run(self, execution: Execution, console: Console) -> dict[str, Any]:
        network = NETWORKS[self.network]
        rate = network.rate if self.rate is None else self.rate
        batch, size = self.batch or network.batch, self.size or network.size
        with console.status(f"building {self.network}"):
            steps, missing = peers(self.network, self.depth, rate, batch, size, execution)
        rounds = list(shown(take_turns(steps, self.repeats), self.repeats, console))
        timed = timings(rounds)
        with console.status("memory"):
            memory = {name: step_memory(step, execution.device) for name, step in steps.items()}
        count = batch * (size if network.unit == "tokens" else 1)
        ours = OURS if OURS in timed else None
        of_depth = f"-{self.depth}" if self.network == "cifar-resnet" else ""
        title = f"{self.network}{of_depth}, drop rate {rate:g}, batch {batch}, size {size}"
        console.print(table_of(title, timed, count, network.unit, memory, ours))
        console.print(f"memory: {MEMORY}", highlight=False)
        for name, reason in missing.items():
            console.print(f"{name}: {reason}", markup=False, highlight=False)
        means = {name: statistics.fmean(timing.seconds) for name, timing in timed.items()}
        return {
            "batch": batch,
            "size": size,
            "rate": rate,
            "libraries": {name: _version(name) for name in network.libraries},
            "seconds": {name: list(timing.seconds) for name, timing in timed.items()},
            f"{network.unit}_per_second": {name: count / mean for name, mean in means.items()},
            "memory_bytes": memory,
            "memory": MEMORY,
            "ours_is_faster_by": {
                name: mean / means[ours] for name, mean in means.items() if ours and name != ours
            },
            "constant": CONSTANT,
            "missing": missing,
        }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
