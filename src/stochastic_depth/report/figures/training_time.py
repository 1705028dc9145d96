"""What an epoch takes: the paper's table 2, with the saving that the FLOPs promise."""

import math

import altair as alt

from stochastic_depth.report.experiment import Experiment, Series
from stochastic_depth.report.figure import Figure, Row
from stochastic_depth.report.figures.marks import chart, colour, keys, layered
from stochastic_depth.report.measures import interval_seconds, on_one_machine, time_saved
from stochastic_depth.report.style import LIGHT
from stochastic_depth.report.wording import duration, share

POINTS = 150
"""Shown of each series at the most."""


def training_time(experiment: Experiment) -> Figure:
    """Every interval a stroke, their median a bar, and a mark where the FLOPs say it should end."""
    interval = "epoch" if experiment.config.evaluate_every is None else "interval"
    rows: list[Row] = [
        {
            "series": series.name,
            "run": run.name,
            "epoch": record.epoch,
            "seconds": record.seconds,
        }
        for series in experiment.series
        for run in series.runs
        for record in run.records
    ]
    bars, expected = _bars(experiment)
    y = alt.Y(
        "s:N", title=None, sort=None, axis=alt.Axis(labelColor=LIGHT["ink"], labelFontSize=12)
    )
    x = alt.X("x:Q", title=f"seconds an {interval}", axis=alt.Axis(tickCount=6, format="~g"))
    hue = colour(keys(experiment.series)).legend(None)
    bar = {"band": 0.7}
    layers = [
        chart(bars).mark_bar(opacity=0.3, height=bar).encode(x, y, hue, description="told:N"),
        chart([dot for series in experiment.series for dot in _dots(series)])
        .mark_tick(opacity=0.5, thickness=1.5, height=bar)
        .encode(x, y, hue, description="told:N"),
        chart(expected)
        .mark_tick(color=LIGHT["ink"], thickness=3, height={"band": 0.95})
        .encode(x, y, description="told:N"),
    ]
    return Figure(
        id="training-time",
        title="Training time",
        sentence=_sentence(experiment, interval),
        rows=rows,
        panels=(layered(*layers),),
        note=f"Thin: every {interval} of every seed. Bars: their median. "
        + "Upright: constant depth less the FLOPs of dropped blocks. " * bool(expected)
        + "Evaluation is not counted."
        + " Not all runs were on one machine: the seconds are not to be compared."
        * (not on_one_machine(*experiment.series)),
        height=46 * len(experiment.series),
        axis=130,
    )


def _bars(experiment: Experiment) -> tuple[list[Row], list[Row]]:
    """The medians, and where they are expected."""
    medians = {series.name: interval_seconds(series) for series in experiment.series}
    bars: list[Row] = [
        {"s": name, "x": median, "told": f"{name}: median {duration(median)}"}
        for name, median in medians.items()
    ]
    if experiment.constant is None:
        return bars, []
    base = medians[experiment.constant.name]
    return bars, [
        {
            "s": series.name,
            "x": base * (1 - series.cost.saving),
            "told": f"{series.name}: {duration(base * (1 - series.cost.saving))} expected",
        }
        for series in experiment.stochastic
    ]


def _dots(series: Series) -> list[Row]:
    records = [(run.name, record) for run in series.runs for record in run.records]
    chosen = records[:: math.ceil(len(records) / POINTS)]
    return [
        {
            "s": series.name,
            "x": record.seconds,
            "told": f"{name}, epoch {record.epoch:g}: {duration(record.seconds)}",
        }
        for name, record in chosen
    ]


def _sentence(experiment: Experiment, interval: str) -> str:
    told = [f"{series.name} {duration(interval_seconds(series))}" for series in experiment.series]
    sentence = f"The median {interval} takes: {', '.join(told)}."
    constant = experiment.constant
    if constant is None:
        return sentence
    for series in experiment.stochastic:
        saved, due = time_saved(series, constant), series.cost.saving
        sentence += f" {series.name[0].upper()}{series.name[1:]} saves {share(saved)} of the time"
        sentence += f", where its FLOPs promise {share(due)}."
    return sentence
