"""What skipping saves on many GPUs, on paper: the tables of docs/design/scale.md.

    python tools/scale.py

Bytes are exact: sums over the parameters of the networks, blocks weighed by their survival
probability, as `stochastic-depth bench distributed` counts them on real collectives. Seconds follow
from the machine that is stated here, in which communication overlaps with computing perfectly, one
pass at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from stochastic_depth.models import ImageNetResNet
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes of eight, every one with a network card of its own."""

    name: str
    node: int = 8
    inside: float = 300e9
    """Bytes a second that a GPU sends to others of its node while all do."""
    between: float = 40e9
    """Bytes a second that a GPU sends to other nodes while all do: 400 Gbit/s, at 80 %."""
    latency: float = 20e-6
    """Seconds that a collective takes on top, for each doubling of the GPUs."""
    flops: float = 400e12
    """A second, as training reaches them: 40 % of the 990e12 of dense bfloat16."""

    def collective(self, sent: float, gpus: int, calls: float) -> float:
        """Seconds of `calls` collectives in which each GPU sends `sent` bytes in all."""
        speed = self.inside if gpus <= self.node else self.between
        return sent / speed + calls * self.latency * (gpus - 1).bit_length()


@dataclass(frozen=True)
class Network:
    """A stack of blocks, and all else."""

    name: str
    blocks: Sequence[float]
    """Parameters of each block's branch."""
    rest: float
    """All other parameters."""
    flops: float
    """Of a GPU's forward pass in a step."""
    rest_flops: float
    """Those of them that are in no branch."""
    efficiency: float
    """The share of the machine's speed that its kernels reach."""

    def expected(self, survival: Sequence[float]) -> tuple[float, float, float]:
        """Expected parameters and forward FLOPs in open blocks and the rest, and open blocks."""
        parameters = self.rest + sum(p * n for p, n in zip(survival, self.blocks, strict=True))
        share = sum(survival) / len(self.blocks)
        flops = self.rest_flops + (self.flops - self.rest_flops) * share
        return parameters, flops, sum(survival)


def resnet152(images: int = 64) -> Network:
    """On ImageNet: 11.5 billion multiply-adds an image, spread evenly over the blocks."""
    model = ImageNetResNet(152)
    handle = apply(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    blocks = [sum(sizes[name] for name in block.parameters) for block in handle.blocks]
    flops = 2 * 11.5e9 * images
    # Convolutions with batch normalisation are bound by memory; a stem and shortcuts are 5 %.
    return Network(
        f"ResNet-152, {images} images a GPU",
        blocks,
        sum(sizes.values()) - sum(blocks),
        flops,
        0.05 * flops,
        efficiency=0.35,
    )


def language_model(tokens: int = 8192, layers: int = 32, width: int = 4096) -> Network:
    """7B: attention, and a gated feed-forward part 2.69 times as wide as the model."""
    block = 4 * width**2 + 3 * width * 11008
    rest = 2 * 32000 * width
    flops = 2.0 * tokens * (layers * block + rest / 2)
    return Network(
        f"7B language model, {tokens:,} tokens a GPU",
        [block] * layers,
        rest,
        flops,
        2.0 * tokens * rest / 2,
        efficiency=1.0,
    )


def data_parallel(network: Network, survival: Sequence[float], machine: Machine, gpus: int):
    """Seconds and bytes sent by each GPU in a step: float32 gradients are all-reduced backward."""
    parameters, flops, _ = network.expected(survival)
    sent = 2 * (gpus - 1) / gpus * 4 * parameters
    forward = flops / (machine.flops * network.efficiency)
    calls = max(1.0, 4 * parameters / 25e6)  # buckets of 25 MB
    return forward + max(2 * forward, machine.collective(sent, gpus, calls)), sent


def sharded(
    network: Network,
    survival: Sequence[float],
    machine: Machine,
    gpus: int,
    sent: Sequence[float] | None = None,
) -> tuple[float, float]:
    """As FSDP2: bfloat16 parameters gathered in both passes, float32 gradients scattered.

    Args:
        sent: the probabilities with which each block communicates, if not those of `survival`.
    """
    _, flops, _ = network.expected(survival)
    parameters, _, blocks = network.expected(survival if sent is None else sent)
    passed_on, calls = (gpus - 1) / gpus, blocks + 1
    gathered, scattered = passed_on * 2 * parameters, passed_on * 4 * parameters
    forward = flops / (machine.flops * network.efficiency)
    seconds = max(forward, machine.collective(gathered, gpus, calls)) + max(
        2 * forward, machine.collective(gathered + scattered, gpus, 2 * calls)
    )
    return seconds, 2 * gathered + scattered


def table(network: Network, way, machine: Machine) -> list[str]:
    layers = len(network.blocks)
    constant = [1.0] * layers
    rule = LinearDecay(0.5)
    stochastic = [rule(block, layers) for block in range(1, layers + 1)]
    lines = [
        f"{network.name}, {way.__name__.replace('_', ' ')}, {machine.name}",
        "",
        "| GPUs | sent, GB: constant | p_L = 0.5 | saved | step, ms: constant | p_L = 0.5 | saved "
        "| saved, if closed blocks are sent |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for gpus in (8, 64, 1024):
        before, sent = way(network, constant, machine, gpus)
        after, still_sent = way(network, stochastic, machine, gpus)
        if way is data_parallel:
            forward = network.expected(stochastic)[1] / (machine.flops * network.efficiency)
            calls = 4 * network.expected(constant)[0] / 25e6
            all_sent = forward + max(2 * forward, machine.collective(sent, gpus, calls))
        else:
            all_sent, _ = sharded(network, stochastic, machine, gpus, sent=constant)
        lines.append(
            f"| {gpus:,} | {sent / 1e9:.2f} | {still_sent / 1e9:.2f} | "
            f"{100 * (1 - still_sent / sent):.1f} % | {1e3 * before:.0f} | {1e3 * after:.0f} | "
            f"{100 * (1 - after / before):.1f} % | {100 * (1 - all_sent / before):.1f} % |"
        )
    return [*lines, ""]


def main() -> None:
    fast = Machine("400 Gbit/s a GPU between nodes")
    slow = Machine("100 Gbit/s a GPU between nodes", between=10e9)
    for machine in (fast, slow):
        print("\n".join(table(resnet152(), data_parallel, machine)))
        print("\n".join(table(language_model(), sharded, machine)))


if __name__ == "__main__":
    main()
