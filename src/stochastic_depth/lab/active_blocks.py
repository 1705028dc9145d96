"""How many blocks are active: the exact distribution, and the counts of a run."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import Tensor

from stochastic_depth.lab.recorded import RecordedRun
from stochastic_depth.residual import Residual
from stochastic_depth.train.build import apply_survival, build_model


def active_distribution(survival: Tensor) -> Tensor:
    """The exact probabilities that 0, 1, ..., L blocks are active (Poisson-binomial).

    Args:
        survival: p_l, float64 [..., L].

    Returns:
        float64 [..., L + 1]. Coins are added one by one, in O(L^2) and without cancellation.
    """
    *batch, blocks = survival.shape
    chances = survival.new_zeros(*batch, blocks + 1)
    chances[..., 0] = 1
    for p in survival.unbind(-1):
        more = chances[..., :-1] * p[..., None]
        chances = chances * (1 - p)[..., None]
        chances[..., 1:] += more
    return chances


def balanced_distribution(survival: Tensor) -> Tensor:
    """The same for balanced gates: only the floor and the ceiling of the sum of p_l are possible.

    Args:
        survival: p_l, float64 [..., L].
    """
    depth = survival.sum(-1, keepdim=True)
    number = torch.arange(survival.shape[-1] + 1, dtype=torch.float64)
    return (1 - (number - depth).abs()).clamp(min=0)


@dataclass(frozen=True)
class ActiveBlocks:
    """How often n = 0..L blocks were active in the steps of runs."""

    counts: list[int]
    """[L + 1]: in how many steps (or samples, with gates for single samples) n blocks were
    active."""
    expected: list[float]
    """[L + 1]: the exact probabilities; under a schedule, their means over the steps, of which
    `STEPS` are computed."""

    def moments(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The mean and the standard deviation, as drawn and exact."""
        drawn = [count / sum(self.counts) for count in self.counts]
        return _moments(drawn), _moments(self.expected)

    def p_value(self) -> float:
        """The p-value of Pearson's chi-square test that the counts follow the exact distribution.

        Neighbouring n are pooled until 5 are expected in each pool. If one pool remains, it is 1.0.
        """
        total, pools, drawn, expected = sum(self.counts), [], 0, 0.0
        for count, chance in zip(self.counts, self.expected, strict=True):
            drawn, expected = drawn + count, expected + total * chance
            if expected > 5 - 1e-9:  # a sum of exactly 5 may be rounded down
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


STEPS = 1000
"""At how many steps a distribution that changes over time is computed, at most."""


def active_blocks(runs: Sequence[RecordedRun]) -> ActiveBlocks:
    """The counts of runs so far, and their exact distribution, from their journals alone.

    Args:
        runs: at least one. They have records, and differ only in their seed.
    """
    survival_at, blocks = _survival_of(runs[0])
    counts = [0] * (blocks + 1)
    weights: defaultdict[tuple[float, ...], float] = defaultdict(float)
    for run in runs:
        for record in run.records:
            for active, steps in record.active_counts.items():
                counts[int(active)] += steps
        taken = run.records[-1].step
        shown = min(taken, STEPS)
        for number in range(shown):  # evenly spread
            weights[survival_at((2 * number + 1) * taken // (2 * shown))] += taken / shown
    survival = runs[0].run.config.survival
    balanced = survival.balance and survival.gate == "batch"
    distribution = balanced_distribution if balanced else active_distribution
    distributions = distribution(torch.tensor(list(weights), dtype=torch.float64))
    shares = torch.tensor(list(weights.values()), dtype=torch.float64)
    return ActiveBlocks(counts, (shares @ distributions / shares.sum()).tolist())


def _survival_of(recorded: RecordedRun) -> tuple[Callable[[int], tuple[float, ...]], int]:
    """(p_1, ..., p_L) as a function of the step, and L."""
    run, last = recorded.run, recorded.records[-1]
    with torch.device("meta"):
        model = build_model(run.config.model, run.shape[0], len(run.classes), run.config.seed)
    steps = round(run.config.epochs * last.step / last.epoch)
    handle = apply_survival(model, run.config.survival, 0, steps)
    if handle is None:
        blocks = sum(isinstance(m, Residual) for m in model.modules())
        return lambda step: (1.0,) * blocks, blocks
    return handle.survival_at, len(handle.blocks)


def _moments(chances: Sequence[float]) -> tuple[float, float]:
    mean = sum(n * chance for n, chance in enumerate(chances))
    variance = sum((n - mean) ** 2 * chance for n, chance in enumerate(chances))
    return mean, variance**0.5


def active_table(name: str, found: ActiveBlocks) -> Table:
    """A row for every number of active blocks that was drawn, or is expected at least once."""
    total = sum(found.counts)
    table = Table(title=name, title_justify="left")
    for column in ("active blocks", "drawn", "expected"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    largest = max(*found.counts, *(total * chance for chance in found.expected))
    for active, (count, chance) in enumerate(zip(found.counts, found.expected, strict=True)):
        if count or total * chance >= 0.5:
            bar = "█" * round(36 * count / largest)
            table.add_row(f"{active}", f"{count:,}", f"{total * chance:,.1f}", bar)
    return table
