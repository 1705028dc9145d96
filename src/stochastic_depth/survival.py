"""Survival probabilities p_l of the blocks l = 1..L, numbered from input to output."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from stochastic_depth.errors import SurvivalError

SurvivalRule = Callable[[int, int], float]
"""`rule(l, L) -> p_l`: the survival probability of block l (1-based) of L."""

TimedRule = Callable[[int, int, int], float]
"""`rule(l, L, t) -> p_l`: the survival probability in training step t, from 0."""

Survival = SurvivalRule | TimedRule | Sequence[float] | Mapping[str, float]
"""A rule; or (p_1, ..., p_L); or p_l by the names of blocks, 1 for blocks that are not named."""

Schedule = Callable[[int], float]
"""`schedule(t) -> s`, from 0 to 1: in step t the drop rate of block l is s (1 - p_l)."""


@dataclass(frozen=True)
class LinearDecay:
    """p_l = 1 - (l / L) * (1 - p_L): early blocks nearly always survive, the last with p_L.

    The default of the paper (section 3, equation 4). `final` is p_L, reached exactly.

    Examples:
        >>> rule = sd.LinearDecay(0.5)
        >>> [rule(block, 4) for block in (1, 2, 3, 4)]
        [0.875, 0.75, 0.625, 0.5]
    """

    final: float = 0.5

    def __call__(self, block: int, blocks: int) -> float:
        fraction = block / blocks
        return (1 - fraction) + fraction * self.final


@dataclass(frozen=True)
class Uniform:
    """p_l = p for every block (the paper, section 3).

    Examples:
        >>> sd.Uniform(0.8)(block=3, blocks=4)
        0.8
    """

    p: float = 0.5

    def __call__(self, block: int, blocks: int) -> float:
        return self.p


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
        _steps(self, "until", self.until, minimum=1)

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
        _steps(self, "until", self.until, minimum=1)
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
        _steps(self, "until", self.until, minimum=0)

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
        if not 0 < self.gamma < math.inf:
            raise SurvivalError(f"{self!r}: gamma must be above 0")

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
        _steps(self, "since", self.since, minimum=0)
        _steps(self, "until", self.until, minimum=self.since + 1)

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
        pairs: Iterable[tuple[int, float]] = dict(shares).items()
        object.__setattr__(self, "shares", tuple((int(a), float(b)) for a, b in sorted(pairs)))
        for step, share in self.shares:
            _steps(self, "a step", step, minimum=0)
            if not 0 <= share <= 1:
                raise SurvivalError(f"{self!r}: the share {share} is not in [0, 1]")

    def __call__(self, step: int) -> float:
        return next((share for start, share in reversed(self.shares) if step >= start), 0.0)


def _steps(schedule: object, name: str, value: int, minimum: int) -> None:
    """Raise `SurvivalError` unless `value` is a number of steps, `minimum` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SurvivalError(f"{schedule!r}: {name} is a number of steps, {minimum} or more")


@dataclass(frozen=True)
class Probabilities:
    """(p_1, ..., p_L) in every training step."""

    final: tuple[float, ...]
    """(p_1, ..., p_L) at the full drop rates."""
    schedule: Schedule | None = None
    rule: TimedRule | None = None
    """A rule of (block, blocks, step), which takes the place of `final`."""
    positions: tuple[tuple[int, int], ...] = ()
    """(block, blocks) for each block, as `rule` is called with them."""

    def at(self, step: int) -> tuple[float, ...]:
        """(p_1, ..., p_L) in training step `step`: 1 - s (1 - p_l) under a schedule.

        Raises:
            SurvivalError: when a schedule or a rule gives a number outside [0, 1].
        """
        if self.rule is not None:
            rule = self.rule
            return tuple(
                _checked(lambda block, blocks: rule(block, blocks, step), *at, zero=True, of=rule)
                for at in self.positions
            )
        if self.schedule is None:
            return self.final
        share = _share(self.schedule, step)
        return self.final if share == 1 else tuple(1 - share * (1 - p) for p in self.final)

    @property
    def full(self) -> tuple[float, ...]:
        """(p_1, ..., p_L) at the full drop rates; under a rule of the step, those of step 0."""
        return self.final if self.rule is None else self.at(0)

    def described(self) -> dict[str, Any]:
        """These probabilities and their schedule as plain values, for checkpoints."""
        return {
            "survival": list(self.final),
            "schedule": _described(self.rule if self.schedule is None else self.schedule),
        }


def _share(schedule: Schedule, step: int) -> float:
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


def _described(function: object) -> dict[str, Any] | None:
    if function is None:
        return None
    kind = function if hasattr(function, "__qualname__") else type(function)
    name = f"{kind.__module__}.{kind.__qualname__}"  # type: ignore[attr-defined]
    if not is_dataclass(function) or isinstance(function, type):
        return {"name": name}
    values = {f.name: getattr(function, f.name) for f in fields(function)}
    if isinstance(function, Steps):
        values = {"shares": [list(pair) for pair in function.shares]}
    return {"name": name.removeprefix(f"{__name__}."), **values}


def survival_probabilities(
    rule: SurvivalRule, blocks: int, zero: bool = False
) -> tuple[float, ...]:
    """(p_1, ..., p_L) for L = `blocks`.

    Args:
        zero: whether p_l = 0 is allowed, as under a schedule, where a block may not run yet.

    Raises:
        SurvivalError: when the rule returns a p_l outside (0, 1], or something that is not a
            number.
    """
    if not callable(rule):
        raise SurvivalError(
            f"survival={rule!r} is not a rule: give sd.LinearDecay(0.5), sd.Uniform(0.8) "
            "or any function of (block, blocks) that returns a probability"
        )
    return tuple(_checked(rule, block, blocks, zero) for block in range(1, blocks + 1))


def probabilities_of(
    survival: Survival,
    names: Sequence[str],
    stacks: str | Sequence[str] = (),
    schedule: Schedule | None = None,
) -> Probabilities:
    """(p_1, ..., p_L) over time, of the blocks with these names.

    Args:
        stacks: the name of a module or several, in each of which a rule counts l from 1 to its L.
            Blocks outside all of them form one more stack.
        schedule: how the drop rates change; not allowed for a rule of (block, blocks, step).

    Raises:
        SurvivalError: when a p_l is outside (0, 1], or [0, 1] where it changes; or when `survival`,
            `stacks` and `schedule` do not fit the names or each other.
    """
    if isinstance(survival, type):
        raise SurvivalError(
            f"survival={survival.__name__} is a class: give an object of it, as sd.LinearDecay(0.5)"
        )
    if schedule is not None and (not callable(schedule) or isinstance(schedule, type)):
        raise SurvivalError(
            f"schedule={schedule!r} is not a schedule: give sd.Warmup(1000), sd.Early(1000) or any "
            "function of the step that returns the share of the drop rates, from 0 to 1"
        )
    if not _is_timed(survival):
        final = survival_of(survival, names, stacks, zero=schedule is not None)
        made = Probabilities(final, schedule)
    elif schedule is not None:
        raise SurvivalError(
            f"{survival!r} is a rule of the step itself: leave out schedule={schedule!r}"
        )
    else:
        positions = _positions(names, stacks)
        made = Probabilities((), None, survival, positions)  # type: ignore[arg-type]
    made.at(0)
    return made


def _is_timed(survival: Survival) -> bool:
    """Whether `survival` is a function that requires three arguments."""
    if not callable(survival):
        return False
    try:
        parameters = inspect.signature(survival).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in positional) == 3


def survival_of(
    survival: Survival, names: Sequence[str], stacks: str | Sequence[str] = (), zero: bool = False
) -> tuple[float, ...]:
    """(p_1, ..., p_L) of the blocks with these names, as `probabilities_of` without a schedule.

    Raises:
        SurvivalError: when a p_l is outside (0, 1], or `survival` or `stacks` do not fit the names.
    """
    if (
        callable(survival)
        or isinstance(survival, str)
        or not isinstance(survival, Mapping | Sequence)
    ):
        if not callable(survival):
            survival_probabilities(survival, 1)  # type: ignore[arg-type]
        rule: SurvivalRule = survival  # type: ignore[assignment]
        return tuple(_checked(rule, *at, zero) for at in _positions(names, stacks))
    if stacks:
        raise SurvivalError(f"stacks={stacks!r} needs a rule: p_l is given block by block")
    if isinstance(survival, Mapping):
        for name in survival.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
            raise SurvivalError(
                f"survival names {name!r}, but there is no such block; similar names: "
                f"{', '.join(map(repr, near)) or 'none'}; sd.plan shows the blocks"
            )
        survival = [survival.get(name, 1.0) for name in names]
    if len(survival) != len(names):
        raise SurvivalError(
            f"survival gives {len(survival)} probabilities, the model has {len(names)} blocks; "
            "sd.plan shows them"
        )
    given = list(survival)
    return tuple(
        _checked(lambda block, _: given[block - 1], n + 1, len(names), zero, "survival")
        for n in range(len(names))
    )


def _positions(names: Sequence[str], stacks: str | Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(l, L) of each block within its stack."""
    stacks = [stacks] if isinstance(stacks, str) else stacks
    stack_of = [
        max((s for s in stacks if name == s or name.startswith(f"{s}.")), key=len, default=None)
        for name in names
    ]
    for stack in stacks:
        if stack not in stack_of:
            raise SurvivalError(
                f"stacks={list(stacks)}: no block belongs to {stack!r} (a block belongs to the "
                "innermost listed stack); sd.plan shows the blocks"
            )
    return tuple(
        (stack_of[: n + 1].count(stack), stack_of.count(stack)) for n, stack in enumerate(stack_of)
    )


def _checked(
    rule: SurvivalRule, block: int, blocks: int, zero: bool = False, of: object = None
) -> float:
    try:
        p = float(rule(block, blocks))
    except (TypeError, ValueError) as error:
        raise SurvivalError(
            f"{_shown(of or rule)} gives no number for block {block}: {error}"
        ) from error
    if not (0 <= p <= 1 if zero else 0 < p <= 1):
        raise SurvivalError(
            f"{_shown(of or rule)} gives block {block} of {blocks} the survival probability {p}; "
            f"it must be {'at least' if zero else 'above'} 0 and at most 1"
        )
    return p


def _shown(rule: object) -> str:
    return rule if isinstance(rule, str) else repr(rule)
