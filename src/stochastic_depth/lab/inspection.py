"""A page on one model: its blocks, open and closed, their cost, and what drop rates would save."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
from torch import nn

from stochastic_depth.draw import draw
from stochastic_depth.files import write_output
from stochastic_depth.lab.bench.rates import RATES, Saving, measure_rates
from stochastic_depth.lab.charts import Figure, Key, Row, chart, layered
from stochastic_depth.lab.formatting import duration, share
from stochastic_depth.lab.page import render
from stochastic_depth.lab.report import Report, Section
from stochastic_depth.lab.style import LIGHT, STOCHASTIC
from stochastic_depth.lab.tables import ReportTable, Tile
from stochastic_depth.plain_text import count_text, si
from stochastic_depth.surgery import Summary
from stochastic_depth.train.config import Config
from stochastic_depth.train.runtime import machine, resolve_runtime

STEPS = 24
"""How many training steps are in the picture of open and closed blocks."""
OPEN, CLOSED = Key("open: the branch runs", STOCHASTIC[0]), Key("closed: skipped", LIGHT["grid"])


def write_inspection(
    out: Path, name: str, model: nn.Module, example: Any, costs: Summary, repeats: int
) -> None:
    """Measure what drop rates save on a model with stochastic depth, and write its page."""
    seconds, savings = measure_rates(model, example, costs, repeats)
    write_output(out, inspection_page(name, example, costs, seconds, savings).encode())


def inspection_page(
    name: str, example: Any, costs: Summary, seconds: float, savings: Sequence[Saving]
) -> str:
    """The page with the results, as HTML."""
    best = savings[-1]
    runtime = resolve_runtime(Config(engine="eager"))
    about = machine(runtime)
    note = (
        f"Measured on {about['processor']}, {count_text(int(about['threads']), 'thread')}, with "
        "the example of this command; linear decay of the survival probability. The forward and "
        f"backward pass of a training step at full depth take {duration(seconds)}; nothing else "
        "is timed. Memory is what a step keeps for its backward pass."
    )
    rows = [
        [f"{s.rate:g}", f"{1 - s.rate:g}", share(s.flops), share(s.time), share(s.memory)]
        for s in savings
    ]
    table = ReportTable(
        "Savings of a training step",
        ["drop rate of the last block", "p_L", "FLOPs", "time", "memory"],
        rows,
        note,
    )
    tiles = (
        Tile("Skippable blocks", str(len(costs.blocks)), _kinds(costs)),
        Tile("Time saved", share(best.time), f"at a drop rate of {best.rate:g}"),
        Tile("Memory saved", share(best.memory), "of what is kept for the backward pass"),
    )
    section = Section(
        name,
        (gate_pattern_figure(costs), cost_figure(costs)),
        tiles=tiles,
        tables=(table,),
        code=lines_to_paste(),
    )
    return render(Report((section,)), f"{name}. Every block was verified.")


def lines_to_paste() -> str:
    """Python code that applies stochastic depth, at the highest of `RATES`, to a reader's model."""
    return (
        "import stochastic_depth as sd\n\n"
        "# inputs: a small batch, as the model is called with\n"
        f"handle = sd.apply(model, sd.LinearDecay({1 - RATES[-1]:g}), example=inputs)\n"
        "# the training loop stays as it is; sd.remove(model) undoes it"
    )


def _kinds(costs: Summary) -> str:
    return ", ".join(dict.fromkeys(block.kind for block in costs.blocks))


def gate_pattern_figure(costs: Summary) -> Figure:
    """Which blocks run in a number of training steps, with a cell for each block and step."""
    survival = tuple(block.survival for block in costs.blocks)
    rows: list[Row] = []
    for step in range(STEPS):
        for number, is_open in enumerate(draw(0, step, survival).tolist(), start=1):
            rows.append(
                {
                    "step": step + 1,
                    "block": number,
                    "name": costs.blocks[number - 1].name,
                    "open": int(is_open),
                }
            )
    values: list[Row] = [
        {
            **row,
            "s": (OPEN if row["open"] else CLOSED).name,
            "label": f"step {row['step']}, {row['name']}: {'open' if row['open'] else 'closed'}",
        }
        for row in rows
    ]
    scale = alt.Scale(domain=[OPEN.name, CLOSED.name], range=[OPEN.colour, CLOSED.colour])
    axis = alt.Axis(labelAngle=0, labelOverlap="parity", domain=False, ticks=False)
    cells = (
        chart(values)
        .mark_rect(stroke=LIGHT["paper"], strokeWidth=1)
        .encode(
            x=alt.X("block:O", title="block, from input to output", axis=axis),
            y=alt.Y("step:O", title="training step", axis=axis),
            color=alt.Color("s:N", scale=scale, legend=None),
            description="label:N",
        )
    )
    runs = sum(row["open"] for row in rows) / STEPS
    return Figure(
        id="open-and-closed",
        title="Blocks, open and closed",
        sentence=f"In {STEPS} training steps {runs:.1f} of {len(survival)} blocks ran on average; "
        f"{sum(survival):.1f} are expected.",
        rows=rows,
        panels=(layered(cells),),
        legend=(OPEN, CLOSED),
        note="One coin a block and step, drawn from (seed, step). In evaluation every block runs.",
        height=10 * STEPS,
    )


def cost_figure(costs: Summary) -> Figure:
    """The share of a training step that each block costs when it runs, and on average."""
    full = costs.forward + costs.backward
    rows: list[Row] = [
        {
            "block": number,
            "name": block.name,
            "class": block.kind,
            "survival": block.survival,
            "parameters": block.parameters,
            "forward_flops": block.forward,
            "backward_flops": block.backward,
        }
        for number, block in enumerate(costs.blocks, start=1)
    ]
    values: list[Row] = []
    for row in rows:
        cost = 100 * (row["forward_flops"] + row["backward_flops"]) / full
        values.append(
            {
                "x": row["block"],
                "cost": cost,
                "expected": cost * row["survival"],
                "label": f"{row['name']}: {cost:.2f} % of a step, p = {row['survival']:.3f}, "
                f"{si(row['parameters'])} parameters",
            }
        )
    axis = alt.Axis(labelAngle=0, labelOverlap="parity")
    base = chart(values).encode(x=alt.X("x:O", title="block, from input to output", axis=axis))
    bars = {"width": {"band": 0.8}, "color": STOCHASTIC[0]}
    panel = layered(
        base.mark_bar(opacity=0.3, **bars).encode(
            y=alt.Y("cost:Q", title="percent of a step's FLOPs"), description="label:N"
        ),
        base.mark_bar(opacity=0.75, aria=False, **bars).encode(y="expected:Q"),
    )
    in_blocks = sum(value["cost"] for value in values)
    return Figure(
        id="cost-of-blocks",
        title="Cost of each block",
        sentence=f"Branches that can be skipped are {in_blocks:.1f} % of a training step's FLOPs; "
        f"{100 * costs.expected_saving:.1f} % of them all are not spent at these survival "
        "probabilities.",
        rows=rows,
        panels=(panel,),
        note="Light: a block that runs. Dark: what it costs on average, p_l times that. FLOPs are "
        "2 for each multiply-add, forward and backward.",
        height=200,
    )
