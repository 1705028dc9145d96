"""Can blocks be thrown away? A trained network without its last, or its least needed, blocks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

from stochastic_depth.analysis.least_needed import chosen_order
from stochastic_depth.analysis.recalibration import recalibrated
from stochastic_depth.analysis.removal import (
    Removed,
    Thinned,
    as_thinned,
    errors,
    parameters_without,
    seconds_per_image,
)
from stochastic_depth.analysis.trained import Progress, Trained, read_found, write_found
from stochastic_depth.errors import ConfigError
from stochastic_depth.train.execution import machine

Order = Literal["last", "least needed"]


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how many images."""

    points: int = 19
    """How many numbers of removed blocks, evenly from none to all."""
    choose_on: int = 500
    """Validation images, evenly spread over their part, by which the least needed are found."""
    recalibrate_on: int = 2000
    """Training images, as training sees them, that BatchNorm is recalibrated on: the first
    mini-batches of the first epoch, whole ones."""
    batch: int = 128
    """Images in a batch that is timed."""
    repeats: int = 5
    """Rounds of timing."""

    def __post_init__(self) -> None:
        for name, least in (
            ("points", 2),
            ("choose_on", 1),
            ("recalibrate_on", 2),
            ("batch", 1),
            ("repeats", 2),
        ):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise ConfigError(f"{option}={getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True)
class Point:
    """A network that lost some of its blocks; the others keep their p_l."""

    removed: int
    blocks: list[int]
    """Which ones, from 0: their branches are gone, their shortcuts stay."""
    error: float
    """Percent of the test images."""
    validation_error: float
    parameters: int
    seconds_per_image: float
    """Median over the rounds, in batches."""


@dataclass(frozen=True)
class Curve:
    """Networks with fewer and fewer blocks."""

    order: Order
    recalibrated: bool
    """Whether BatchNorm's statistics were measured anew after the removal."""
    points: list[Point]


def measured_curves(
    network: Trained, settings: Settings, progress: Progress, again: bool = False
) -> list[Curve]:
    """`curves`, written to the run's `analysis/depth.json`, or read where it was before.

    Args:
        again: measure again what was measured before.
    """
    what = {
        "checkpoint_step": network.step,
        "blocks": len(network.handle.blocks),
        "images": network.images.sizes["test"],
        "settings": asdict(settings),
        "machine": machine(network.run.execution),
    }

    def understood(found: dict[str, Any]) -> list[Curve]:
        return [
            Curve(**{**curve, "points": [Point(**point) for point in curve["points"]]})
            for curve in found["curves"]
        ]

    before = None if again else read_found(network.run, "depth", what, understood)
    if before is not None:
        return before
    measured = curves(network, settings, progress)
    write_found(network.run, "depth", {**what, "curves": [asdict(curve) for curve in measured]})
    return measured


def curves(network: Trained, settings: Settings, progress: Progress) -> list[Curve]:
    """Both orders of removal, each as trained and with BatchNorm recalibrated."""
    blocks, images = len(network.handle.blocks), network.images
    orders: dict[Order, list[int]] = {
        "last": list(range(blocks))[::-1],
        "least needed": chosen_order(network, settings.choose_on, progress),
    }
    counts = sorted({round(i * blocks / (settings.points - 1)) for i in range(settings.points)})
    removals = {tuple(sorted(order[:k])): None for order in orders.values() for k in counts}
    mini_batches = -(-settings.recalibrate_on // network.run.config.optimizer.batch)
    training_images = list(islice(images.train(0), mini_batches))
    thinned: dict[tuple[Removed, bool], Thinned] = {}
    for done, removed in enumerate(removals):
        progress("recalibrating", done, len(removals))
        plain = Thinned(removed, None)
        thinned[removed, False] = plain
        with as_thinned(network, plain):
            statistics = recalibrated(network.model, training_images, network.run.execution)
        thinned[removed, True] = Thinned(removed, statistics)
    of_test = errors(network, thinned.values(), "test", progress)
    of_validation = errors(network, thinned.values(), "validation", progress)
    measured = dict(zip(thinned, zip(of_test, of_validation, strict=True), strict=True))
    seconds = seconds_per_image(network, list(removals), settings.batch, settings.repeats, progress)

    def point(order: Sequence[int], k: int, is_recalibrated: bool) -> Point:
        removed = tuple(sorted(order[:k]))
        test, validation = measured[removed, is_recalibrated]
        left = parameters_without(network, removed)
        return Point(k, list(removed), test, validation, left, seconds[removed])

    return [
        Curve(name, is_recalibrated, [point(order, k, is_recalibrated) for k in counts])
        for name, order in orders.items()
        for is_recalibrated in (False, True)
    ]
