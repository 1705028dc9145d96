"""How many blocks are active: the exact distribution, and the counts of a run."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from stochastic_depth.data import Shard
from stochastic_depth.handle import Handle
from stochastic_depth.lab.outcomes import interval_steps
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
    handle, blocks = _gates_of(runs[0])
    counts = [0] * (blocks + 1)
    weights: defaultdict[tuple[float, ...], float] = defaultdict(float)
    for run in runs:
        for record in run.records:
            for active, steps in record.active_counts.items():
                counts[int(active)] += steps
        drawn = _mini_batches(run)
        shown = min(len(drawn), STEPS)
        for first, end in pairwise(number * len(drawn) // shown for number in range(shown + 1)):
            for mini_batch, steps in Counter(drawn[first:end]).items():
                for survival, weight in _rates_at((first + end) // 2, mini_batch, handle, blocks):
                    weights[survival] += steps * weight
    survival = runs[0].run.config.survival
    balanced = survival.balance and survival.gate == "batch"
    distribution = balanced_distribution if balanced else active_distribution
    distributions = distribution(torch.tensor(list(weights), dtype=torch.float64))
    shares = torch.tensor(list(weights.values()), dtype=torch.float64)
    return ActiveBlocks(counts, (shares @ distributions / shares.sum()).tolist())


def _gates_of(recorded: RecordedRun) -> tuple[Handle | None, int]:
    """The handle of a run's network, None at constant depth; and L."""
    run, last = recorded.run, recorded.records[-1]
    with torch.device("meta"):
        model = build_model(run.config.model, run.shape[0], len(run.classes), run.config.seed)
    steps = round(run.config.epochs * last.step / last.epoch)
    handle = apply_survival(model, run.config.survival, 0, steps)
    return handle, sum(isinstance(m, Residual) for m in model.modules())


class MiniBatch(NamedTuple):
    """The size of a mini-batch whose samples have gates of their own."""

    images: int
    processes: int
    """How many processes share the images; each balances its own part."""


def _mini_batches(recorded: RecordedRun) -> list[MiniBatch | None]:
    """The mini-batch of each step that was taken; None where its gates are for all samples.

    The last one of an epoch is often smaller; how much is known from how many samples were counted.
    """
    config, records = recorded.run.config, recorded.records
    step = records[-1].step
    if config.survival.rule == "constant" or config.survival.gate == "batch":
        return [None] * step
    began = int(recorded.run.machine.get("processes", 1))
    processes: list[int] = []
    counted = 0
    for record, steps in zip(records, interval_steps(records), strict=True):
        here = int((record.elsewhere or {}).get("processes", began))
        processes += [here] * steps
        counted += sum(record.active_counts.values()) // (
            here if config.distributed.rank_gates else 1
        )
    batch, per_epoch = config.optimizer.batch, round(step / records[-1].epoch)
    epochs, rest = divmod(step, per_epoch)
    last = batch
    if epochs:
        last = (counted - rest * batch) // epochs - (per_epoch - 1) * batch
    return [
        MiniBatch(max(1, last) if n % per_epoch == 0 else batch, here)
        for n, here in enumerate(processes, start=1)
    ]


def _rates_at(
    step: int, mini_batch: MiniBatch | None, handle: Handle | None, blocks: int
) -> Iterator[tuple[tuple[float, ...], int]]:
    """The shares of samples on which the blocks run in a step, and for how many samples they hold.

    Without gates for single samples these are (p_1, ..., p_L), and they hold for one step.
    """
    if handle is None:
        yield (1.0,) * blocks, 1
    elif mini_batch is None:
        yield handle.survival_at(step), 1
    else:
        images, handle.balanced_parts = mini_batch
        for rank in range(mini_batch.processes):
            part = Shard(rank, mini_batch.processes).slice_of(images)
            samples = part.stop - part.start
            yield handle.shares_at(step, images, samples, part.start), samples


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
