"""How many blocks are active: the exact distribution, and what a run has drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from stochastic_depth.errors import RunError
from stochastic_depth.residual import Residual
from stochastic_depth.survival import ramped
from stochastic_depth.train import Record, Run
from stochastic_depth.train.build import build_depth, build_model


def active_distribution(survival: Tensor) -> Tensor:
    """The probabilities that 0, 1, ..., L blocks are active: Poisson-binomial, exact.

    Args:
        survival: p_l, float64 [..., L].

    Returns:
        float64 [..., L + 1]: coins are added one by one, in O(L^2) without cancellation.
    """
    *batch, blocks = survival.shape
    chances = survival.new_zeros(*batch, blocks + 1)
    chances[..., 0] = 1
    for p in survival.unbind(-1):
        more = chances[..., :-1] * p[..., None]
        chances = chances * (1 - p)[..., None]
        chances[..., 1:] += more
    return chances


@dataclass(frozen=True)
class ActiveBlocks:
    """The number n = 0..L of active blocks over the steps of a run."""

    counts: list[int]
    """[L + 1]: how many steps (samples, with gates for single samples) had n active blocks."""
    expected: list[float]
    """[L + 1]: the exact probabilities; under a ramp their mean over the steps."""

    def moments(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Mean and standard deviation: as drawn, and exact."""
        drawn = [count / sum(self.counts) for count in self.counts]
        return _moments(drawn), _moments(self.expected)

    def p_value(self) -> float:
        """Of Pearson's chi-square test that the counts follow the exact distribution.

        Neighbouring n are pooled until 5 are expected in each; 1.0 where one pool remains.
        """
        total, pools, drawn, expected = sum(self.counts), [], 0, 0.0
        for count, chance in zip(self.counts, self.expected, strict=True):
            drawn, expected = drawn + count, expected + total * chance
            if expected >= 5:
                pools.append((drawn, expected))
                drawn, expected = 0, 0.0
        if not pools:
            return 1.0
        pools[-1] = pools[-1][0] + drawn, pools[-1][1] + expected
        if len(pools) == 1:
            return 1.0
        statistic = sum((drawn - expected) ** 2 / expected for drawn, expected in pools)
        halves = torch.tensor([(len(pools) - 1) / 2, statistic / 2], dtype=torch.float64)
        return torch.special.gammaincc(*halves).item()


def active_blocks(run: Run) -> ActiveBlocks:
    """What `run` has drawn so far against what it should, from its journal alone.

    Raises:
        RunError: when the journal does not tell.
    """
    spans = [
        (before, record)
        for before, record in pairwise([None, *run.records()])
        if record is not None
    ]
    told = [(before, record) for before, record in spans if record.active_counts]
    if not told:
        raise RunError(
            f"{run.journal} does not tell how many blocks were active: it is empty, or of an "
            "older version"
        )
    final, ramp_steps = survival_of_run(run, told[-1][1])
    counts = [0] * (len(final) + 1)
    for _, record in told:
        for active, steps in record.active_counts.items():
            counts[int(active)] += steps
    steps = [
        step for before, record in told for step in range(before.step if before else 0, record.step)
    ]
    return ActiveBlocks(counts, _mixture(final, ramp_steps, steps).tolist())


def survival_of_run(run: Run, record: Record) -> tuple[tuple[float, ...], int]:
    """(p_1, ..., p_L) at the end of the ramp, and the steps the ramp takes."""
    model = build_model(run.config.model, run.shape[0], len(run.classes), run.config.seed)
    survival = run.config.survival
    handle = build_depth(model, replace(survival, ramp_epochs=0.0), 0, 1)
    if handle is None:
        return (1.0,) * sum(isinstance(m, Residual) for m in model.modules()), 0
    return handle.survival, round(survival.ramp_epochs * record.step / record.epoch)


def _mixture(final: tuple[float, ...], ramp_steps: int, steps: Sequence[int]) -> Tensor:
    """The mean of the distributions at `steps`: those after the ramp have one in common."""
    rising = [step for step in steps if step < ramp_steps]
    rows = [ramped(final, ramp_steps, step) for step in [*rising, ramp_steps]]
    weights = torch.ones(len(rows), dtype=torch.float64)
    weights[-1] = len(steps) - len(rising)
    distributions = active_distribution(torch.tensor(rows, dtype=torch.float64))
    return weights @ distributions / len(steps)


def _moments(chances: Sequence[float]) -> tuple[float, float]:
    mean = sum(n * chance for n, chance in enumerate(chances))
    variance = sum((n - mean) ** 2 * chance for n, chance in enumerate(chances))
    return mean, variance**0.5
