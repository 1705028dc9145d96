"""Survival probabilities p_l of the blocks l = 1..L, numbered from input to output."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeGuard

from stochastic_depth.errors import SurvivalError
from stochastic_depth.numbers import real_number, whole_number
from stochastic_depth.schedules import Schedule, share_at

SurvivalRule = Callable[[int, int], float]
"""`rule(l, L) -> p_l`: the survival probability of block l (1-based) of L."""

TimedRule = Callable[[int, int, int], float]
"""`rule(l, L, t) -> p_l`: the survival probability in training step t, from 0."""

Survival = SurvivalRule | TimedRule | Sequence[float] | Mapping[str, float]
"""A rule; or (p_1, ..., p_L); or p_l by the names of blocks, 1 for blocks that are not named."""


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
class Scheduled:
    """(p_1, ..., p_L) of a rule of (block, blocks), whose drop rates a schedule may change."""

    full: tuple[float, ...]
    """(p_1, ..., p_L) at the full drop rates."""
    schedule: Schedule | None = None

    def at(self, step: int) -> tuple[float, ...]:
        """(p_1, ..., p_L) in training step `step`: 1 - s (1 - p_l) under a schedule.

        Raises:
            SurvivalError: when the schedule gives a number outside [0, 1].
        """
        share = 1.0 if self.schedule is None else share_at(self.schedule, step)
        return self.full if share == 1 else tuple(1 - share * (1 - p) for p in self.full)

    def to_json(self) -> dict[str, Any]:
        """These probabilities and their schedule as plain values, for checkpoints."""
        return {"survival": list(self.full), "schedule": _described(self.schedule)}


@dataclass(frozen=True)
class StepDependent:
    """(p_1, ..., p_L) of a rule of (block, blocks, step)."""

    rule: TimedRule
    positions: tuple[tuple[int, int], ...]
    """(block, blocks) for each block."""

    def at(self, step: int) -> tuple[float, ...]:
        """(p_1, ..., p_L) in training step `step`.

        Raises:
            SurvivalError: when the rule gives a number outside [0, 1].
        """
        return tuple(_checked(self.rule, (*at, step), zero=True) for at in self.positions)

    def to_json(self) -> dict[str, Any]:
        """The rule and its p_l in step 0 as plain values, for checkpoints."""
        return {"survival": list(self.at(0)), "schedule": _described(self.rule)}


Probabilities = Scheduled | StepDependent
"""(p_1, ..., p_L) in every training step."""


def _described(function: object) -> dict[str, Any] | None:
    """The name of a rule or schedule, and the values of its fields if it is a dataclass."""
    if function is None:
        return None
    kind = function if hasattr(function, "__qualname__") else type(function)
    name = f"{kind.__module__}.{kind.__qualname__}"  # type: ignore[attr-defined]
    if not is_dataclass(function) or isinstance(function, type):
        return {"name": name}
    values = {f.name: _plain(getattr(function, f.name)) for f in fields(function)}
    return {"name": name.removeprefix(f"{share_at.__module__}."), **values}


def _plain(value: object) -> Any:
    """The value of a field, as a JSON file gives it back."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if is_dataclass(value) or callable(value):
        return _described(value)
    numbers = (number for number in (whole_number(value), real_number(value)) if number is not None)
    return next(numbers, value)


def survival_probabilities(rule: SurvivalRule, blocks: int) -> tuple[float, ...]:
    """(p_1, ..., p_L) for L = `blocks`.

    Raises:
        SurvivalError: when the rule returns a p_l outside (0, 1], or something that is not a
            number.
    """
    _require_rule(rule)
    return tuple(_checked(rule, (block, blocks)) for block in range(1, blocks + 1))


def _require_rule(rule: object) -> None:
    if not callable(rule):
        raise SurvivalError(
            f"survival={rule!r} is not a rule: give sd.LinearDecay(0.5), sd.Uniform(0.8), any "
            "function of (block, blocks) that returns a probability, a sequence of one "
            'probability for each block, a mapping from names of blocks, or "own"'
        )


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
        full = _by_block(survival, names, stacks, zero=schedule is not None)
        made = Scheduled(full, schedule)
    elif schedule is not None:
        raise SurvivalError(
            f"{survival!r} is a rule of the step itself: leave out schedule={schedule!r}"
        )
    else:
        made = StepDependent(survival, _positions(names, stacks))
    made.at(0)
    return made


def _is_timed(survival: Survival) -> TypeGuard[TimedRule]:
    """Whether `survival` is a function that requires three arguments."""
    if not callable(survival):
        return False
    try:
        parameters = inspect.signature(survival).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in positional) == 3


def _by_block(
    survival: Survival, names: Sequence[str], stacks: str | Sequence[str], zero: bool
) -> tuple[float, ...]:
    """(p_1, ..., p_L) of the blocks with these names, from a rule, a sequence or a mapping.

    Args:
        zero: whether p_l = 0 is allowed, as under a schedule, where a block may not run yet.
    """
    if isinstance(survival, str) or not isinstance(survival, Mapping | Sequence):
        _require_rule(survival)
        rule: SurvivalRule = survival  # type: ignore[assignment]
        return tuple(_checked(rule, at, zero) for at in _positions(names, stacks))
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
        _checked(lambda block, _: given[block - 1], (n, len(names)), zero, shown="survival")
        for n in range(1, len(names) + 1)
    )


def _positions(names: Sequence[str], stacks: str | Sequence[str]) -> tuple[tuple[int, int], ...]:
    """(l, L) of each block within its stack."""
    stacks = [stacks] if isinstance(stacks, str) else list(stacks)
    stack_of = [
        max((s for s in stacks if name == s or name.startswith(f"{s}.")), key=len, default=None)
        for name in names
    ]
    for stack in stacks:
        if stack not in stack_of:
            raise SurvivalError(
                f"stacks={stacks}: no block belongs to {stack!r} (a block belongs to the "
                "innermost listed stack); sd.plan shows the blocks"
            )
    return tuple(
        (stack_of[: n + 1].count(stack), stack_of.count(stack)) for n, stack in enumerate(stack_of)
    )


def _checked(
    rule: Callable[..., float], arguments: tuple[int, ...], zero: bool = False, shown: str = ""
) -> float:
    """The survival probability `rule(*arguments)`.

    Args:
        arguments: (l, L), or (l, L, t) for a rule of the step.
        zero: whether p_l = 0 is allowed.
        shown: how errors call the rule.

    Raises:
        SurvivalError: when it is not a number, or outside (0, 1], or [0, 1] with `zero`.
    """
    block, blocks, *_ = arguments
    shown = shown or repr(rule)
    try:
        p = float(rule(*arguments))
    except (TypeError, ValueError) as error:
        raise SurvivalError(f"{shown} gives no number for block {block}: {error}") from error
    if not (0 <= p <= 1 if zero else 0 < p <= 1):
        raise SurvivalError(
            f"{shown} gives block {block} of {blocks} the survival probability {p}; "
            f"it must be {'at least' if zero else 'above'} 0 and at most 1"
        )
    return p
