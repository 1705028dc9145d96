"""What a network costs and errs at each depth that can be chosen: measured."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from stochastic_depth.data import Batches
from stochastic_depth.export.description import Choice, blocks_at, remove_blocks
from stochastic_depth.export.exporting import Plain, sample, training_batches
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.timing import take_turns
from stochastic_depth.train.execution import Execution
from stochastic_depth.train.step import evaluate_parts

DEPTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
BATCH, ROUNDS = 64, 15


def measured(
    plain: Plain, images: Batches, execution: Execution, depths: Sequence[float] = DEPTHS
) -> Plain:
    """The same network with what each of `depths` gives, and the statistics that it needs.

    Lower depths get statistics of BatchNorm of their own, from training images. Times are of a
    batch of 64 images, in turns.
    """
    order = plain.description.order
    networks: dict[int, nn.Module] = {}
    for blocks in (blocks_at(depth, len(order)) for depth in depths):
        networks[blocks] = copy.deepcopy(plain.model)
        remove_blocks(networks[blocks], order[: len(order) - blocks])
        if blocks < len(order):
            update_bn(training_batches(images), networks[blocks])
        networks[blocks].eval()
    batch = sample(images, BATCH)
    with torch.inference_mode():
        calls = {str(blocks): _call(network, batch) for blocks, network in networks.items()}
        rounds = list(take_turns(calls, ROUNDS, warmup=1))
    choices: list[Choice] = []
    statistics: dict[str, Tensor] = {}
    for blocks, network in networks.items():
        with torch.no_grad(), CountFlops() as count:
            network(batch[:1])
        if blocks < len(order):
            statistics |= {
                f"{blocks}/{name}": buffer.clone()
                for name, buffer in network.named_buffers()
                if buffer.is_floating_point()
            }
        network.to(execution.device)
        of_parts = evaluate_parts(network, images, execution)
        choices.append(
            Choice(
                blocks,
                of_parts["validation"].error,
                of_parts["test"].error,
                sum(parameter.numel() for parameter in network.parameters()),
                count.total,
                median(seconds[str(blocks)] for seconds in rounds) / len(batch),
            )
        )
    description = replace(plain.description, choices=tuple(choices))
    return replace(plain, description=description, statistics=statistics)


def _call(network: nn.Module, batch: Tensor) -> Callable[[], Tensor]:
    return lambda: network(batch)
