"""How many blocks are active: the exact distribution, the counts of a run, and their figure."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import altair as alt
import torch
from rich.table import Table
from torch import Tensor

from stochastic_depth.errors import RunError
from stochastic_depth.lab.charts import Figure, Row, chart, colour, keys, layered
from stochastic_depth.lab.formatting import seeds
from stochastic_depth.lab.outcomes import Experiment, Series
from stochastic_depth.lab.style import LIGHT
from stochastic_depth.residual import Residual
from stochastic_depth.train import Record, Run
from stochastic_depth.train.build import build_depth, build_model


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
    """How often n = 0..L blocks were active in the steps of a run."""

    counts: list[int]
    """[L + 1]: in how many steps (or samples, with gates for single samples) n blocks were
    active."""
    expected: list[float]
    """[L + 1]: the exact probabilities; under a schedule, their means over the steps."""

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
    """The counts of `run` so far, and their exact distribution, from its journal alone.

    Raises:
        RunError: when the journal has no counts.
    """
    spans = [
        (before, record)
        for before, record in pairwise([None, *run.records()])
        if record is not None
    ]
    counted = [(before, record) for before, record in spans if record.active_counts]
    if not counted:
        raise RunError(
            f"{run.journal} does not say how many blocks were active: it is empty, or of an "
            "older version"
        )
    survival_at, blocks = survival_of_run(run, counted[-1][1])
    counts = [0] * (blocks + 1)
    for _, record in counted:
        for active, steps in record.active_counts.items():
            counts[int(active)] += steps
    steps = [
        step
        for before, record in counted
        for step in range(before.step if before else 0, record.step)
    ]
    balanced = run.config.survival.balance and run.config.survival.gate == "batch"
    distribution = balanced_distribution if balanced else active_distribution
    rows = Counter(survival_at(step) for step in steps)
    distributions = distribution(torch.tensor(list(rows), dtype=torch.float64))
    weights = torch.tensor(list(rows.values()), dtype=torch.float64)
    return ActiveBlocks(counts, (weights @ distributions / len(steps)).tolist())


def survival_of_run(run: Run, record: Record) -> tuple[Callable[[int], tuple[float, ...]], int]:
    """(p_1, ..., p_L) as a function of the step, and L."""
    model = build_model(run.config.model, run.shape[0], len(run.classes), run.config.seed)
    steps = round(run.config.epochs * record.step / record.epoch)
    handle = build_depth(model, run.config.survival, 0, steps)
    if handle is None:
        blocks = sum(isinstance(m, Residual) for m in model.modules())
        return lambda step: (1.0,) * blocks, blocks
    return handle.survival_at, len(handle.blocks)


def _moments(chances: Sequence[float]) -> tuple[float, float]:
    mean = sum(n * chance for n, chance in enumerate(chances))
    variance = sum((n - mean) ** 2 * chance for n, chance in enumerate(chances))
    return mean, variance**0.5


def active_blocks_figure(series: Series) -> Figure | None:
    """The figure of a series; None if its journals lack counts, or gates are for single samples."""
    plain = series.survival.schedule.kind == "none" and not series.survival.balance
    if series.survival.gate != "batch" or not plain:
        return None
    counts: Counter[int] = Counter()
    for run in series.runs:
        for record in run.records:
            counts.update({int(n): count for n, count in record.active_counts.items()})
    if not counts.total():
        return None
    survival = torch.tensor(series.cost.survival, dtype=torch.float64)
    exact = active_distribution(survival).tolist()
    steps = counts.total()
    rows: list[Row] = [
        {
            "active_blocks": n,
            "steps": counts[n],
            "share_of_steps": counts[n] / steps,
            "probability": probability,
        }
        for n, probability in enumerate(exact)
    ]
    return Figure(
        id="active-blocks",
        title="Active blocks in a step",
        sentence=_sentence(series, counts, exact),
        rows=rows,
        panels=(_panel(series, rows, steps),),
        note=f"Bars: {steps:,} training steps of {seeds(len(series.runs))} ({series.name}). Line: "
        f"the Poisson-binomial distribution, exact for these survival probabilities.",
        height=210,
    )


def drop_rates_figure(experiment: Experiment) -> Figure | None:
    """The mean drop rate over time; None if no run of `experiment` follows a schedule."""
    scheduled = [s for s in experiment.stochastic if s.survival.schedule.kind != "none"]
    if not scheduled:
        return None
    rows: list[Row] = [
        {
            "series": series.name,
            "epoch": record.epoch,
            "drop_rate": 1 - record.expected_active_blocks / blocks,
        }
        for series in scheduled
        for blocks in [len(series.cost.survival)]
        for record in series.runs[0].records
    ]
    values: list[Row] = [
        {
            "s": row["series"],
            "x": row["epoch"],
            "y": row["drop_rate"],
            "label": f"{row['series']}, epoch {row['epoch']:g}: {100 * row['drop_rate']:.1f} %",
        }
        for row in rows
    ]
    x = alt.X("x:Q", title="epoch", axis=alt.Axis(tickCount=6, tickMinStep=1)).scale(nice=False)
    y = alt.Y("y:Q", title="mean of 1 - p_l", axis=alt.Axis(format="%", tickCount=5))
    drawn = chart(values).mark_line(point=True, strokeWidth=2)
    kinds = {s.name: s.survival.schedule.kind for s in scheduled}
    named = " and ".join(
        name if kind in name else f"{name} ({kind})" for name, kind in kinds.items()
    )
    return Figure(
        id="drop-rates",
        title="Drop rate over time",
        sentence=f"The drop rates follow a schedule in {named}.",
        rows=rows,
        panels=(layered(drawn.encode(x, y, colour(keys(scheduled)), description="label:N")),),
        legend=keys(scheduled),
        note="The mean over all blocks, and over the steps of each interval.",
        height=180,
    )


def _panel(series: Series, rows: Sequence[Row], steps: int) -> alt.LayerChart:
    seen = [n for n, row in enumerate(rows) if row["steps"] or row["probability"] > 1e-4]
    shown = rows[max(0, min(seen) - 1) : max(seen) + 2]
    values: list[Row] = [
        {
            "x": row["active_blocks"],
            "share": 100 * row["share_of_steps"],
            "exact": 100 * row["probability"],
            "label": f"{row['active_blocks']} blocks: {row['steps']:,} steps, "
            f"{100 * row['share_of_steps']:.2f} %; expected "
            f"{steps * row['probability']:,.1f}",
        }
        for row in shown
    ]
    axis = alt.Axis(tickMinStep=1, labelAngle=0, labelOverlap="parity")
    base = chart(values).encode(x=alt.X("x:O", title="active blocks", axis=axis))
    return layered(
        base.mark_bar(color=series.colour, opacity=0.45, width={"band": 0.8}).encode(
            y=alt.Y("share:Q", title="percent of steps"), description="label:N"
        ),
        base.mark_line(color=LIGHT["ink"], strokeWidth=1.6, aria=False).encode(y="exact:Q"),
        base.mark_point(color=LIGHT["ink"], filled=True, opacity=1, size=14, aria=False).encode(
            y="exact:Q"
        ),
    )


def _sentence(series: Series, counts: Counter[int], exact: Sequence[float]) -> str:
    steps = counts.total()
    mean = sum(n * count for n, count in counts.items()) / steps
    expected = sum(series.cost.survival)
    error = math.sqrt(sum(p * (1 - p) for p in series.cost.survival) / steps)
    apart = abs(mean - expected) / error if error else 0.0
    distance = sum(abs(counts[n] / steps - p) for n, p in enumerate(exact)) / 2
    blocks = len(series.cost.survival)
    return (
        f"With {series.name}, on average {mean:.2f} of {blocks} blocks ran, where {expected:.2f} "
        f"are expected: {apart:.1f} standard errors away. The two distributions differ in "
        f"{100 * distance:.1f} % of the steps."
    )


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
