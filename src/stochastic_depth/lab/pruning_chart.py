"""The figure of pruned networks."""

import statistics
from itertools import takewhile
from typing import Any

import altair as alt

from stochastic_depth.lab.charts import (
    Figure,
    Key,
    Row,
    chart,
    colour,
    dashes,
    keys,
    layered,
    log_axis,
)
from stochastic_depth.lab.experiments import Experiment, Series
from stochastic_depth.lab.formatting import duration, percent
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.lab.pruning import ORDERS, Order
from stochastic_depth.lab.style import LIGHT

BATCH_NORM = {
    False: Key("as trained", LIGHT["muted"]),
    True: Key("BatchNorm recalibrated", LIGHT["muted"], (4, 3)),
}


def pruned_blocks(experiment: Experiment) -> Figure | None:
    """The figure of the runs whose networks were pruned; None without any."""
    rows: list[Row] = [row for series in experiment.series for row in _rows(series)]
    if not rows:
        return None
    shown = [s for s in experiment.series if any(row["series"] == s.name for row in rows)]
    orders: list[Order] = [order for order in ORDERS if any(row["order"] == order for row in rows)]
    return Figure(
        id="pruned-blocks",
        title="Blocks pruned after training",
        sentence=_sentence(shown, rows),
        rows=rows,
        panels=tuple(_panel(shown, rows, order) for order in orders),
        legend=(*keys(shown), *BATCH_NORM.values()),
        note="Which blocks are least needed is chosen on validation images. Solid: as trained. "
        "Dashed: the statistics of BatchNorm measured again. Mean over seeds.",
    )


def _rows(series: Series) -> list[Row]:
    return [
        {
            "series": series.name,
            "run": run.name,
            "order": curve["order"],
            "recalibrated": BATCH_NORM[curve["recalibrated"]].name,
            "removed": point["removed"],
            "blocks": " ".join(map(str, point["blocks"])),
            **{
                k: point[k]
                for k in ("error", "validation_error", "parameters", "seconds_per_image")
            },
        }
        for run in series.runs
        for content in [run.analysis("pruning")]
        if content
        for curve in content["curves"]
        for point in curve["points"]
    ]


def _panel(shown: list[Series], rows: list[Row], order: Order) -> alt.LayerChart:
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["order"] == order:
            key = (row["series"], row["recalibrated"], row["removed"])
            cells.setdefault(key, []).append(row)
    values: list[Row] = [
        {
            "s": series,
            "norm": norm,
            "x": removed,
            "y": spread.mean,
            "label": f"{series}, {removed} removed, {norm}: {percent(spread)}; "
            f"{members[0]['parameters']:,} parameters, "
            f"{duration(_mean(members, 'seconds_per_image'))} an image",
        }
        for (series, norm, removed), members in cells.items()
        for spread in [Spread.of([row["error"] for row in members])]
    ]
    base = chart(values).encode(
        x=alt.X("x:Q", title="blocks removed, k", axis=alt.Axis(tickMinStep=1, tickCount=6)),
        y=log_axis([row["error"] for row in rows], "test error, percent"),
        color=colour(keys(shown)),
    )
    dash = dashes(list(BATCH_NORM.values()), "norm", legend=True)
    return layered(
        base.mark_line(strokeWidth=1.8, aria=False).encode(strokeDash=dash),
        base.mark_point(filled=True, opacity=1, size=20).encode(
            detail="norm:N", description="label:N"
        ),
        title=ORDERS[order],
    )


def _sentence(shown: list[Series], rows: list[Row]) -> str:
    """How many of its last blocks each network can lose before it loses 5 % of its accuracy."""
    clauses = []
    for series in shown:
        errors: dict[int, list[float]] = {}
        for row in rows:
            drawn = row["series"], row["order"], row["recalibrated"]
            if drawn == (series.name, "last", BATCH_NORM[False].name):
                errors.setdefault(row["removed"], []).append(row["error"])
        curve = {removed: statistics.fmean(errors[removed]) for removed in sorted(errors)}
        first, *removals = curve
        most = 100 - 0.95 * (100 - curve[first])
        kept = list(takewhile(lambda k, curve=curve, most=most: curve[k] <= most, removals))
        removed, share = (kept[-1], "95 %") if kept else (removals[0], "less than 95 %")
        last = "block" if removed == 1 else f"{removed} blocks"
        clauses.append(
            f"{series.name} ({curve[first]:.2f} % error with all blocks) keeps {share} of its "
            f"accuracy without its last {last}"
        )
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _mean(rows: list[Row], key: str) -> float:
    return statistics.fmean(row[key] for row in rows)
