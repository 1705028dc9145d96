"""Turn a trained run into a plain network with a description, and measure it at each depth."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stochastic_depth.choices import CheckpointName
from stochastic_depth.data import Batches
from stochastic_depth.export.depths import (
    Progress,
    errors_of,
    parameters_of,
    pruning_order,
    seconds_of,
    without_blocks,
)
from stochastic_depth.export.description import (
    Architecture,
    DepthChoice,
    Description,
    ImageInput,
    blocks_at,
)
from stochastic_depth.export.fold import fold
from stochastic_depth.export.truncate import truncate
from stochastic_depth.surgery import handle_of
from stochastic_depth.surgery.applied import applied_inside
from stochastic_depth.surgery.flops import CountFlops
from stochastic_depth.train import Run, best_record, trained_model
from stochastic_depth.train.build import architecture, handle_or_always_open
from stochastic_depth.train.runtime import Runtime, versions

CHECKED = 32
"""Number of test images used to check a written file."""
RECALIBRATION = 64
"""Number of training batches that measure the BatchNorm statistics of a shallower network."""


@dataclass(frozen=True)
class Plain:
    """A plain network on the CPU, in evaluation mode, ready to be written."""

    model: nn.Module
    description: Description
    images: Tensor
    """Test images on which the network was run: float32 [32, channels, height, width]."""
    expected: Tensor
    """The outputs of the trained network for these images."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """BatchNorm statistics at lower depths, named "N/name" for N remaining blocks."""


def plain_network(run: Run, batches: Batches, which: CheckpointName = "best") -> Plain:
    """The network of a checkpoint as a plain one on the CPU, with p_l in its weights.

    Raises:
        CheckpointError: as `trained_model`.
    """
    return _plain(run, batches, *trained_model(run, batches, which), ())


def shallower_network(
    run: Run, batches: Batches, which: CheckpointName, depth: float, progress: Progress
) -> Plain:
    """As `plain_network`, without the blocks that validation needs least.

    Raises:
        ApplyError: when the network has no residual blocks.
    """
    model, step = trained_model(run, batches, which)
    blocks = len(handle_or_always_open(model).blocks)
    count = blocks - blocks_at(depth, blocks)
    return _plain(run, batches, model, step, _order(run, batches, model, count, progress))


def elastic_network(run: Run, batches: Batches, which: CheckpointName, progress: Progress) -> Plain:
    """As `plain_network`, with the order in which its blocks are needed least.

    Raises:
        ApplyError: when the network has no residual blocks.
    """
    model, step = trained_model(run, batches, which)
    blocks = len(handle_or_always_open(model).blocks)
    order = _order(run, batches, model, blocks - 1, progress)
    last = set(range(blocks)) - set(order)
    plain = _plain(run, batches, model, step, ())
    return replace(plain, description=replace(plain.description, order=(*order, *last)))


def _order(
    run: Run, batches: Batches, model: nn.Module, count: int, progress: Progress
) -> list[int]:
    return pruning_order(
        model, count, lambda: batches.evaluate("validation"), run.runtime, progress
    )


def _plain(
    run: Run, batches: Batches, model: nn.Module, step: int, dropped: Sequence[int]
) -> Plain:
    checked = sample(batches, CHECKED)
    model = model.cpu().to(memory_format=torch.contiguous_format).eval()  # pyright: ignore[reportCallIssue]
    if dropped:
        keep = [n for n in range(len(handle_of(model).blocks)) if n not in dropped]
        truncate(model, keep, checked[:4], recalibrate=training_batches(batches))
    with torch.no_grad():
        expected = model(checked)
    if applied_inside(model):
        fold(model, checked[:4])
    return Plain(model, _describe(run, batches, step, tuple(sorted(dropped))), checked, expected)


def training_batches(batches: Batches) -> Iterator[Tensor]:
    """The first training batches, on the CPU."""
    return (batch.cpu() for batch, _ in itertools.islice(batches.train(0), RECALIBRATION))


def sample(batches: Batches, count: int) -> Tensor:
    """The first few test images, on the CPU: float32 [count, channels, height, width]."""
    return next(iter(batches.evaluate("test")))[0][:count].cpu().contiguous()


def _describe(run: Run, batches: Batches, step: int, removed: tuple[int, ...]) -> Description:
    config = run.config
    kind, shape = architecture(config.model, batches.shape[0], len(batches.classes))
    records = run.records()
    evaluated = {record.step: record for record in records}
    record = evaluated.get(step)  # None: the run was stopped there, between two evaluations
    survival: dict[str, Any] = config.to_json()["survival"]
    return Description(
        Architecture(kind.__name__, shape, removed),
        ImageInput(
            batches.shape,
            batches.shorter_side,
            tuple(batches.mean.tolist()),
            tuple(batches.std.tolist()),
            batches.scaling,
        ),
        batches.classes,
        survival,
        {
            "run": run.id,
            "recipe": config.recipe,
            "step": step,
            "best": step == best_record(records).step,
            "validation_error": record and record.validation_error,
            "test_error": record and record.test_error,
        },
        versions(),
    )


DEPTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""The shares of blocks at which an elastic network is measured."""
BATCH, ROUNDS = 64, 15
"""The images in the batch that is timed, and how many rounds are timed."""


def measured(plain: Plain, batches: Batches, runtime: Runtime, progress: Progress) -> Plain:
    """Measure the network at each of `DEPTHS`: its error, its cost and its BatchNorm statistics.

    The statistics of each lower depth come from training images. Times are measured on a batch of
    64 images, in turns.
    """
    order, model = plain.description.order, copy.deepcopy(plain.model)
    counts = dict.fromkeys(blocks_at(depth, len(order)) for depth in DEPTHS)
    networks: dict[int, nn.Module] = {}
    for done, blocks in enumerate(counts):
        progress("recalibrating", done, len(counts))
        removed = order[: len(order) - blocks]
        again = training_batches(batches) if removed else None
        networks[blocks] = without_blocks(model, removed, again)
    batch = sample(batches, BATCH)
    flops: list[int] = []
    statistics: dict[str, Tensor] = {}
    for blocks, network in networks.items():
        with torch.no_grad(), CountFlops() as count:
            network(batch[:1])
        flops.append(count.total)
        if blocks < len(order):
            statistics |= {
                f"{blocks}/{name}": buffer.clone()
                for name, buffer in network.named_buffers()
                if buffer.is_floating_point()
            }
    shallower = list(networks.values())
    on_cpu = replace(runtime, device="cpu", precision="float32")
    seconds = seconds_of(shallower, batch, on_cpu, ROUNDS, progress)
    for network in shallower:
        network.to(runtime.device)
    validation = errors_of(shallower, batches, "validation", runtime, progress)
    test = validation
    if batches.held_out:
        test = errors_of(shallower, batches, "test", runtime, progress)
    sizes = map(parameters_of, shallower)
    columns = networks, validation, test, sizes, flops, seconds
    choices = tuple(DepthChoice(*row) for row in zip(*columns, strict=True))
    description = replace(plain.description, choices=choices)
    return replace(plain, description=description, statistics=statistics)
