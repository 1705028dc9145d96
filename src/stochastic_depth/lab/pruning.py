"""Prune a trained network: remove its last blocks, or those that are needed least."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn

from stochastic_depth.data.batching import Batch
from stochastic_depth.export.depths import (
    Progress,
    errors_of,
    parameters_of,
    pruning_order,
    seconds_of,
    without_blocks,
)
from stochastic_depth.export.fold import fold
from stochastic_depth.lab.analyses import load_or_measure
from stochastic_depth.lab.formatting import plus_minus, runs_text
from stochastic_depth.lab.options import PruningOptions
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.lab.recorded import TrainedNetwork
from stochastic_depth.tensors import copied
from stochastic_depth.train.runtime import machine

Order = Literal["last", "least needed"]


@dataclass(frozen=True)
class CurvePoint:
    """A network without some of its blocks; the others keep their p_l."""

    removed: int
    blocks: list[int]
    """The numbers of the removed blocks, from 1 at the input. Their branches are removed and their
    shortcuts stay."""
    error: float
    """The test error in percent."""
    validation_error: float
    parameters: int
    seconds_per_image: float
    """The median over rounds, measured on a batch."""


@dataclass(frozen=True)
class Curve:
    """The same network with fewer and fewer blocks."""

    order: Order
    recalibrated: bool
    """Whether the BatchNorm statistics were measured again after the removal."""
    points: list[CurvePoint]


def load_or_measure_curves(
    network: TrainedNetwork,
    settings: PruningOptions,
    progress: Progress,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Curve]:
    """The result of `measure_curves`, read from the run's `analysis/pruning.json` or written there.

    Args:
        again, say: as for `load_or_measure`.
    """
    what = {
        "checkpoint_step": network.step,
        "blocks": len(network.handle.blocks),
        "images": network.batches.sizes["test"],
        "settings": asdict(settings),
        "machine": machine(network.run.runtime),
    }

    def measure() -> dict[str, Any]:
        curves = measure_curves(network, settings, progress)
        return {"curves": [asdict(curve) for curve in curves]}

    found = load_or_measure(network.run, "pruning", what, measure, again, say)
    return [
        Curve(**{**curve, "points": [CurvePoint(**point) for point in curve["points"]]})
        for curve in found["curves"]
    ]


def measure_curves(
    network: TrainedNetwork, settings: PruningOptions, progress: Progress
) -> list[Curve]:
    """Both orders of removal, each as trained and with recalibrated BatchNorm statistics."""
    blocks, batches, runtime = len(network.handle.blocks), network.batches, network.run.runtime
    orders: dict[Order, list[int]] = {
        "last": list(range(blocks))[::-1],
        "least needed": _least_needed(network, settings.choose_on, progress),
    }
    counts = sorted({round(i * blocks / (settings.points - 1)) for i in range(settings.points)})
    removals = {tuple(sorted(order[:k])): None for order in orders.values() for k in counts}
    mini_batches = -(-settings.recalibrate_on // network.run.config.optimizer.batch)
    training_images = [batch for batch, _ in islice(batches.train(0), mini_batches)]
    batch = next(iter(batches.evaluate("test")))[0][: settings.batch]
    plain = copied(network.model)
    fold(plain, batch[:4])
    as_it_is: dict[tuple[int, ...], nn.Module] = {}
    recalibrated: dict[tuple[int, ...], nn.Module] = {}
    for done, removed in enumerate(removals):
        progress("recalibrating", done, len(removals))
        as_it_is[removed] = without_blocks(plain, removed)
        with runtime.autocast():
            recalibrated[removed] = without_blocks(plain, removed, training_images)
    networks = [*as_it_is.values(), *recalibrated.values()]
    test = errors_of(networks, batches, "test", runtime, progress)
    validation = errors_of(networks, batches, "validation", runtime, progress)
    errors = dict(zip(networks, zip(test, validation, strict=True), strict=True))
    networks = list(as_it_is.values())
    times = seconds_of(networks, batch, runtime, settings.repeats, progress)
    seconds = dict(zip(as_it_is, times, strict=True))

    def point(order: Sequence[int], k: int, of: dict[tuple[int, ...], nn.Module]) -> CurvePoint:
        removed = tuple(sorted(order[:k]))
        numbers = [block + 1 for block in removed]
        left = parameters_of(of[removed])
        return CurvePoint(k, numbers, *errors[of[removed]], left, seconds[removed])

    return [
        Curve(name, of is recalibrated, [point(order, k, of) for k in counts])
        for name, order in orders.items()
        for of in (as_it_is, recalibrated)
    ]


def _least_needed(network: TrainedNetwork, choose_on: int, progress: Progress) -> list[int]:
    """All blocks in the order in which to remove them, by the loss on validation images."""
    validation = network.batches.sizes["validation"]
    few = list(spread(network.batches.evaluate("validation"), validation, choose_on))
    blocks = len(network.handle.blocks)
    return pruning_order(network.model, blocks, lambda: few, network.run.runtime, progress)


def spread(batches: Iterable[Batch], images: int, count: int) -> Iterator[Batch]:
    """Choose `count` of the `images` in `batches`, evenly: they may be sorted by class."""
    count = min(count, images)
    chosen = torch.arange(count) * images // count
    start = 0
    for pixels, labels in batches:
        here = chosen[(chosen >= start) & (chosen < start + len(labels))] - start
        if len(here):
            here = here.to(labels.device)
            yield pixels[here], labels[here]
        start += len(labels)


ORDERS: dict[Order, str] = {
    "last": "The last k blocks removed",
    "least needed": "The k least needed removed",
}


def pruning_table(order: Order, of_kinds: dict[str, list[list[Curve]]]) -> Table:
    """Test errors as trained and recalibrated; for a single kind, parameters and times too."""
    alone = len(of_kinds) == 1
    runs = sorted({len(of_kind) for of_kind in of_kinds.values()})
    table = Table(
        title=(
            f"Test error, %, without the {order} blocks, {runs_text(*runs)}\n"
            "as it is, and with the statistics of BatchNorm recalibrated"
        ),
        title_justify="left",
    )
    table.add_column("\nremoved", justify="right")
    if alone:
        table.add_column("\nparameters", justify="right")
        table.add_column("ms an\nimage", justify="right")
    for name in of_kinds:
        for variant in ("as it is", "recal."):
            table.add_column(f"{name}\n{variant}", justify="right")
    removed = sorted({p.removed for kind in of_kinds.values() for p in kind[0][0].points})
    for k in removed:
        row = [f"{k}"]
        for of_kind in of_kinds.values():
            plain, again = (
                _points_at(of_kind, order, recalibrated, k) for recalibrated in (False, True)
            )
            if alone:
                row.append(f"{_spread(plain, lambda p: p.parameters).mean:,.0f}")
                row.append(f"{_spread(plain, lambda p: 1000 * p.seconds_per_image).mean:.3g}")
            row += [
                plus_minus(_spread(points, lambda p: p.error)) if points else ""
                for points in (plain, again)
            ]
        table.add_row(*row)
    return table


def _points_at(
    of_kind: list[list[Curve]], order: Order, recalibrated: bool, k: int
) -> list[CurvePoint]:
    """The point at which `k` blocks are removed, for every run of a kind."""
    return [
        point
        for curves in of_kind
        for curve in curves
        if (curve.order, curve.recalibrated) == (order, recalibrated)
        for point in curve.points
        if point.removed == k
    ]


def _spread(points: list[CurvePoint], figure: Callable[[CurvePoint], float]) -> Spread:
    return Spread.of([figure(point) for point in points])
