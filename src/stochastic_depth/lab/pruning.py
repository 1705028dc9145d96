"""Prune a trained network: remove its last blocks, or those that are needed least."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Literal

from rich.table import Table

from stochastic_depth.export.depths import Progress
from stochastic_depth.lab.formatting import plus_minus, runs_text
from stochastic_depth.lab.options import PruningOptions
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.lab.pruned_network import (
    PrunedNetwork,
    Removed,
    choose_order,
    errors,
    measure_statistics,
    parameters_without,
    prune,
    seconds_per_image,
)
from stochastic_depth.lab.sources import TrainedNetwork, same_analysis, write_analysis
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
    network: TrainedNetwork, settings: PruningOptions, progress: Progress, again: bool = False
) -> list[Curve]:
    """The result of `measure_curves`, read from the run's `analysis/pruning.json` or written there.

    Args:
        again: whether to measure again what was measured before.
    """
    what = {
        "checkpoint_step": network.step,
        "blocks": len(network.handle.blocks),
        "images": network.images.sizes["test"],
        "settings": asdict(settings),
        "machine": machine(network.run.runtime),
    }

    before = None if again else same_analysis(network.run, "pruning", what)
    if before is not None:
        return [
            Curve(**{**curve, "points": [CurvePoint(**point) for point in curve["points"]]})
            for curve in before["curves"]
        ]
    curves = measure_curves(network, settings, progress)
    write_analysis(network.run, "pruning", {**what, "curves": [asdict(curve) for curve in curves]})
    return curves


def measure_curves(
    network: TrainedNetwork, settings: PruningOptions, progress: Progress
) -> list[Curve]:
    """Both orders of removal, each as trained and with recalibrated BatchNorm statistics."""
    blocks, images = len(network.handle.blocks), network.images
    orders: dict[Order, list[int]] = {
        "last": list(range(blocks))[::-1],
        "least needed": choose_order(network, settings.choose_on, progress),
    }
    counts = sorted({round(i * blocks / (settings.points - 1)) for i in range(settings.points)})
    removals = {tuple(sorted(order[:k])): None for order in orders.values() for k in counts}
    mini_batches = -(-settings.recalibrate_on // network.run.config.optimizer.batch)
    training_images = list(islice(images.train(0), mini_batches))
    pruned: dict[tuple[Removed, bool], PrunedNetwork] = {}
    for done, removed in enumerate(removals):
        progress("recalibrating", done, len(removals))
        plain = PrunedNetwork(removed, None)
        pruned[removed, False] = plain
        with prune(network, plain):
            statistics = measure_statistics(network.model, training_images, network.run.runtime)
        pruned[removed, True] = PrunedNetwork(removed, statistics)
    of_test = errors(network, pruned.values(), "test", progress)
    of_validation = errors(network, pruned.values(), "validation", progress)
    measured = dict(zip(pruned, zip(of_test, of_validation, strict=True), strict=True))
    seconds = seconds_per_image(network, list(removals), settings.batch, settings.repeats, progress)

    def point(order: Sequence[int], k: int, is_recalibrated: bool) -> CurvePoint:
        removed = tuple(sorted(order[:k]))
        test, validation = measured[removed, is_recalibrated]
        left = parameters_without(network, removed)
        numbers = [block + 1 for block in removed]
        return CurvePoint(k, numbers, test, validation, left, seconds[removed])

    return [
        Curve(name, is_recalibrated, [point(order, k, is_recalibrated) for k in counts])
        for name, order in orders.items()
        for is_recalibrated in (False, True)
    ]


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
