"""Training curves and training time: the paper's figure 3 and table 2."""

import math

import altair as alt

from stochastic_depth.lab.charts import (
    Figure,
    Row,
    at_epoch,
    chart,
    colour,
    curve_panel,
    curve_rows,
    keys,
    layered,
)
from stochastic_depth.lab.experiments import Experiment, Series
from stochastic_depth.lab.formatting import (
    difference,
    duration,
    percent,
    seeds,
    share,
    timing_note,
)
from stochastic_depth.lab.style import LIGHT
from stochastic_depth.plain_text import epoch_text


def training_curves(experiment: Experiment) -> Figure:
    """The figure of training loss and test error of every run of an experiment."""
    panels = (
        curve_panel(
            experiment,
            lambda record: record.train_loss,
            "Training loss",
            "cross-entropy, nats",
            lambda loss: f"{loss:.4g}",
        ),
        curve_panel(
            experiment,
            lambda record: record.test_error,
            "Test error",
            "percent",
            lambda error: f"{error:.2f} %",
        ),
    )
    rows = curve_rows(
        experiment,
        {
            "train_loss": lambda record: record.train_loss,
            "validation_error": lambda record: record.validation_error,
            "test_error": lambda record: record.test_error,
            "learning_rate": lambda record: record.learning_rate,
        },
    )
    hidden = sum(not row["test_error"] for row in rows)
    return Figure(
        id="training-curves",
        title="Training loss and test error",
        sentence=_curves_sentence(experiment),
        rows=rows,
        panels=panels,
        legend=keys(experiment.series),
        note="Thin: each seed. Thick: their mean. Dotted: the learning rate is divided."
        + f" {hidden} test errors of zero have no place on a logarithmic axis." * bool(hidden),
    )


def _curves_sentence(experiment: Experiment) -> str:
    now = experiment.comparable()
    errors = {series.name: series.outcome.test_error_last for series in now.series}
    epoch = max(run.records[-1].epoch for run in now.runs)
    clauses = "; ".join(
        f"{series.name} {percent(errors[series.name])} ({seeds(len(series.runs))})"
        for series in now.series
    )
    sentence = f"Test error after epoch {epoch_text(epoch)}: {clauses}."
    if now.constant is None or len(now.stochastic) != 1:
        return sentence
    constant, stochastic = now.constant, now.stochastic[0]
    apart = difference(errors[stochastic.name], errors[constant.name], stochastic, constant)
    return f"{sentence} {apart[0].upper()}{apart[1:]}."


POINTS_OF_SERIES = 150
"""How many points of each series are shown, at most."""


def training_time(experiment: Experiment) -> Figure:
    """The figure of training time: intervals as strokes, averages as bars, expected times."""
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
    now = experiment.comparable()
    bars, expected = _bars(now)
    y = alt.Y(
        "s:N", title=None, sort=None, axis=alt.Axis(labelColor=LIGHT["ink"], labelFontSize=12)
    )
    x = alt.X("x:Q", title=f"seconds an {interval}", axis=alt.Axis(tickCount=6, format=".6~g"))
    hue = colour(keys(experiment.series)).legend(None)
    bar = {"band": 0.7}
    layers = [
        chart(bars).mark_bar(opacity=0.3, height=bar).encode(x, y, hue, description="label:N"),
        chart([dot for series in experiment.series for dot in _dots(series)])
        .mark_tick(opacity=0.5, thickness=1.5, height=bar)
        .encode(x, y, hue, description="label:N"),
        chart(expected)
        .mark_tick(color=LIGHT["ink"], thickness=3, height={"band": 0.95})
        .encode(x, y, description="label:N"),
    ]
    return Figure(
        id="training-time",
        title="Training time",
        sentence=_time_sentence(now, interval),
        rows=rows,
        panels=(layered(*layers),),
        note=f"Thin: every {interval} of every seed. Bars: their {now.average}. "
        + "Upright: constant depth less the FLOPs of dropped blocks. " * bool(expected)
        + f"Evaluation is not counted. {timing_note(experiment.runs)}".rstrip(),
        height=46 * len(experiment.series),
        axis=130,
    )


def _bars(experiment: Experiment) -> tuple[list[Row], list[Row]]:
    """The average of each series; and where it is expected from the FLOPs."""
    seconds = {series.name: experiment.interval_seconds(series) for series in experiment.series}
    bars: list[Row] = [
        {"s": name, "x": value, "label": f"{name}: {experiment.average} {duration(value)}"}
        for name, value in seconds.items()
    ]
    if experiment.constant is None:
        return bars, []
    base = seconds[experiment.constant.name]
    return bars, [
        {
            "s": series.name,
            "x": base * (1 - series.cost.saving),
            "label": f"{series.name}: {duration(base * (1 - series.cost.saving))} expected",
        }
        for series in experiment.stochastic
    ]


def _dots(series: Series) -> list[Row]:
    records = [(run.name, record) for run in series.runs for record in run.records]
    chosen = records[:: math.ceil(len(records) / POINTS_OF_SERIES)]
    return [
        {
            "s": series.name,
            "x": record.seconds,
            "label": at_epoch(name, record.epoch, duration(record.seconds)),
        }
        for name, record in chosen
    ]


def _time_sentence(experiment: Experiment, interval: str) -> str:
    clauses = [
        f"{series.name} {duration(experiment.interval_seconds(series))}"
        for series in experiment.series
    ]
    sentence = f"The {experiment.average} {interval} takes: {', '.join(clauses)}."
    for series in experiment.stochastic:
        saved, due = experiment.time_saved(series), series.cost.saving
        if saved is None:
            continue
        sentence += f" {series.name[0].upper()}{series.name[1:]} saves {share(saved)} of the time"
        sentence += f", where its FLOPs promise {share(due)}."
    return sentence
