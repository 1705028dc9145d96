"""Survival probabilities p_l of the blocks l = 1..L, numbered from input to output."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from stochastic_depth.errors import SurvivalError

SurvivalRule = Callable[[int, int], float]
"""`rule(l, L) -> p_l`: the survival probability of block l (1-based) of L."""

Survival = SurvivalRule | Sequence[float] | Mapping[str, float]
"""A rule; (p_1, ..., p_L); or p_l by the names of blocks, 1 for those that are not named."""


@dataclass(frozen=True)
class LinearDecay:
    """p_l = 1 - (l / L) * (1 - p_L): early blocks nearly always survive, the last one with p_L.

    The default of the paper (section 3, equation 4). `final` is p_L, reached exactly.
    """

    final: float = 0.5

    def __call__(self, block: int, blocks: int) -> float:
        fraction = block / blocks
        return (1 - fraction) + fraction * self.final


@dataclass(frozen=True)
class Uniform:
    """p_l = p for every block (the paper, section 3)."""

    p: float = 0.5

    def __call__(self, block: int, blocks: int) -> float:
        return self.p


@dataclass(frozen=True)
class Ramp:
    """`rule`, reached gradually: the drop rates 1 - p_l grow from 0 to the rule's in `steps` steps.

    For networks that only converge when no block is dropped at first. Called as a rule it gives
    the probabilities at its end.
    """

    rule: Survival
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SurvivalError(f"Ramp(steps={self.steps}): a ramp takes at least one step")

    def __call__(self, block: int, blocks: int) -> float:
        if not callable(self.rule):
            raise SurvivalError(f"{self!r} is no rule of a block's number")
        return self.rule(block, blocks)


def ramped(survival: tuple[float, ...], steps: int, step: int) -> tuple[float, ...]:
    """The probabilities at `step` of a ramp of `steps` steps that ends at `survival`."""
    if step >= steps:
        return survival
    return tuple(1 - step / steps * (1 - p) for p in survival)


def survival_probabilities(rule: SurvivalRule, blocks: int) -> tuple[float, ...]:
    """(p_1, ..., p_L) for L = `blocks`.

    Raises:
        SurvivalError: when the rule gives a p_l outside (0, 1] or no number at all.
    """
    if not callable(rule):
        raise SurvivalError(
            f"survival={rule!r} is not a rule: give sd.LinearDecay(0.5), sd.Uniform(0.8) "
            "or any function of (block, blocks) that returns a probability"
        )
    return tuple(_checked(rule, block, blocks) for block in range(1, blocks + 1))


def survival_of(
    survival: Survival, names: Sequence[str], stacks: Sequence[str] = ()
) -> tuple[float, ...]:
    """(p_1, ..., p_L) of the blocks with these names.

    Args:
        stacks: names of modules in each of which a rule counts l and L anew; blocks outside of all
            of them are one more stack.

    Raises:
        SurvivalError: when a p_l is outside (0, 1], or `survival` or `stacks` do not fit the names.
    """
    if isinstance(survival, Ramp):
        survival = survival.rule
    if (
        callable(survival)
        or isinstance(survival, str)
        or not isinstance(survival, Mapping | Sequence)
    ):
        return _by_rule(survival, names, stacks)  # type: ignore[arg-type]
    if stacks:
        raise SurvivalError(f"stacks={list(stacks)} are for rules: p_l is given block by block")
    if isinstance(survival, Mapping):
        for name in survival.keys() - set(names):
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
            raise SurvivalError(
                f"survival names {name!r}, which is no block; near it are "
                f"{', '.join(map(repr, near)) or 'none'}; sd.plan shows the blocks"
            )
        survival = [survival.get(name, 1.0) for name in names]
    if len(survival) != len(names):
        raise SurvivalError(
            f"survival gives {len(survival)} probabilities, the model has {len(names)} blocks; "
            "sd.plan shows them"
        )
    given = list(survival)
    return survival_probabilities(lambda block, blocks: given[block - 1], len(names))


def _by_rule(rule: SurvivalRule, names: Sequence[str], stacks: Sequence[str]) -> tuple[float, ...]:
    stack_of = [
        max((s for s in stacks if name == s or name.startswith(f"{s}.")), key=len, default=None)
        for name in names
    ]
    for stack in stacks:
        if stack not in stack_of:
            raise SurvivalError(f"stacks names {stack!r}, in which there is no block of its own")
    each = {
        stack: iter(survival_probabilities(rule, stack_of.count(stack))) for stack in set(stack_of)
    }
    return tuple(next(each[stack]) for stack in stack_of)


def _checked(rule: SurvivalRule, block: int, blocks: int) -> float:
    try:
        p = float(rule(block, blocks))
    except (TypeError, ValueError) as error:
        raise SurvivalError(f"{rule!r} gives no number for block {block}: {error}") from error
    if not 0 < p <= 1:
        raise SurvivalError(
            f"{rule!r} gives block {block} of {blocks} the survival probability {p}; "
            "it must be above 0 and at most 1"
        )
    return p
