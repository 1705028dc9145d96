"""Schedules: how drop rates change over the training steps."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from stochastic_depth.errors import SurvivalError
from stochastic_depth.numbers import real_number, whole_number

Schedule = Callable[[int], float]
"""`schedule(t) -> s`, from 0 to 1: in step t the drop rate of block l is s (1 - p_l)."""


@dataclass(frozen=True)
class Warmup:
    """Drop rates that grow linearly from 0 to those of the rule, which they reach at step `until`.

    This is for networks that only converge when no block is dropped at first.

    Examples:
        >>> [sd.Warmup(1000)(step) for step in (0, 500, 1000)]
        [0.0, 0.5, 1.0]
    """

    until: int

    def __post_init__(self) -> None:
        _require_steps(self, until=1)

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.until)


@dataclass(frozen=True)
class Early:
    """Drop rates that are 0 from step `until` on: for networks that underfit.

    Before that they fall linearly to 0 with shape "linear", or stay those of the rule with shape
    "constant" (Liu et al. 2023, arXiv:2303.01500, "Dropout reduces underfitting").

    Examples:
        >>> [sd.Early(1000)(step) for step in (0, 500, 1000)]
        [1.0, 0.5, 0.0]
    """

    until: int
    shape: Literal["linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        _require_steps(self, until=1)
        if self.shape not in ("linear", "constant"):
            raise SurvivalError(f'{self!r}: the shape must be "linear" or "constant"')

    def __call__(self, step: int) -> float:
        if step >= self.until:
            return 0.0
        return 1.0 if self.shape == "constant" else 1 - step / self.until


@dataclass(frozen=True)
class Late:
    """No block is dropped until step `until` (Liu et al. 2023): for networks that overfit late.

    Examples:
        >>> [sd.Late(1000)(step) for step in (0, 500, 1000)]
        [0.0, 0.0, 1.0]
    """

    until: int

    def __post_init__(self) -> None:
        _require_steps(self, until=0)

    def __call__(self, step: int) -> float:
        return float(step >= self.until)


@dataclass(frozen=True)
class Progressive:
    """Drop rates that approach those of the rule as 1 - exp(-gamma * step).

    This is progressive layer dropping (Zhang and He 2020, arXiv:2010.13369, equation 3). Its theta
    is p_L of the rule: `sd.LinearDecay(theta)`.

    Examples:
        >>> [round(sd.Progressive(0.001)(step), 3) for step in (0, 500, 1000)]
        [0.0, 0.393, 0.632]
    """

    gamma: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < (real_number(self.gamma) or 0) < math.inf:
            raise SurvivalError(f"{self!r}: gamma must be a number above 0")

    def __call__(self, step: int) -> float:
        return -math.expm1(-self.gamma * step)


@dataclass(frozen=True)
class Decreasing:
    """Drop rates that stay those of the rule until step `since`, then fall to 0 at `until`.

    The last part of the training is at full depth, as in evaluation.

    Examples:
        >>> [sd.Decreasing(500, 1000)(step) for step in (0, 500, 1000)]
        [1.0, 1.0, 0.0]
    """

    since: int
    until: int

    def __post_init__(self) -> None:
        _require_steps(self, since=0)
        _require_steps(self, until=self.since + 1)

    def __call__(self, step: int) -> float:
        return min(1.0, max(0.0, (self.until - step) / (self.until - self.since)))


@dataclass(frozen=True)
class Steps:
    """Shares of the rule's drop rates, each in force from its step on; 0 before the first step.

    Examples:
        >>> [sd.Steps({0: 0.2, 1000: 0.6})(step) for step in (0, 500, 1000)]
        [0.2, 0.2, 0.6]
    """

    shares: tuple[tuple[int, float], ...]

    def __init__(self, shares: Mapping[int, float] | Iterable[tuple[int, float]]) -> None:
        pairs: Iterable[Any] = shares.items() if isinstance(shares, Mapping) else shares
        given = [(_whole(step), real_number(share)) for step, share in pairs]
        for step, share in given:
            if step is None or step < 0 or share is None or not 0 <= share <= 1:
                raise SurvivalError(
                    f"Steps({shares!r}): give steps, integers from 0, each with its share of the "
                    "drop rates, a number from 0 to 1"
                )
        object.__setattr__(self, "shares", tuple(sorted(given)))
        if not self.shares:
            raise SurvivalError(f"{self!r}: give at least one step and its share")
        for (step, _), (following, _) in pairwise(self.shares):
            if step == following:
                raise SurvivalError(f"{self!r}: step {step} has two shares, give it one")

    def __call__(self, step: int) -> float:
        return next((share for start, share in reversed(self.shares) if step >= start), 0.0)


def _whole(step: object) -> int | None:
    """A whole number, which may be a float, as a Python integer; None for anything else."""
    return int(step) if isinstance(step, float) and step.is_integer() else whole_number(step)


def _require_steps(schedule: object, **minimum: int) -> None:
    """Raise `SurvivalError` unless these fields are numbers of steps, not below their minimum."""
    for name, least in minimum.items():
        steps = _whole(getattr(schedule, name))
        if steps is None or steps < least:
            raise SurvivalError(f"{schedule!r}: {name} is a number of steps, {least} or more")
        object.__setattr__(schedule, name, steps)


def share_at(schedule: Schedule, step: int) -> float:
    """The share of the drop rates in training step `step`.

    Raises:
        SurvivalError: when `schedule` gives something else than a number from 0 to 1.
    """
    try:
        share = float(schedule(step))
    except (TypeError, ValueError) as error:
        raise SurvivalError(f"{schedule!r} gives no number for step {step}: {error}") from error
    if not 0 <= share <= 1:
        raise SurvivalError(
            f"{schedule!r} gives step {step} the share {share} of the drop rates; it must be at "
            "least 0 and at most 1"
        )
    return share
