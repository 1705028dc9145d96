"""Pictures of runs, drawn from their journals alone."""

import io
import statistics
from collections.abc import Callable
from pathlib import Path

from stochastic_depth.analysis.comparison import KINDS, Comparison
from stochastic_depth.extras import require
from stochastic_depth.train import Record, Run
from stochastic_depth.train.files import write_whole

COLOURS = {"constant": "#8a6d3b", "stochastic": "#1f6feb"}


def plot_comparison(
    path: Path, title: str, comparison: Comparison, runs: dict[str, list[Run]]
) -> None:
    """Training loss and test error against the epoch, and the seconds an epoch takes, as PNG."""
    figure = require("matplotlib.figure", "train").Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    loss, error, seconds = figure.subplots(1, 3)
    _curves(loss, runs, lambda record: record.train_loss)
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy, nats")
    _curves(error, runs, lambda record: record.test_error)
    error.set(title="Test error", xlabel="epoch", ylabel="percent")
    error.legend(frameon=False)
    _seconds(seconds, comparison, runs)
    for axes in (loss, error, seconds):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())


def _curves(axes, runs: dict[str, list[Run]], value: Callable[[Record], float]) -> None:
    """Each seed thin, their mean thick; an error of zero is off the scale."""
    ticker = require("matplotlib.ticker", "train")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    for kind in KINDS:
        journals = [run.records() for run in runs[kind]]
        epochs = [record.epoch for record in journals[0]]
        curves = [[value(record) for record in records] for records in journals]
        for curve in curves:
            axes.plot(epochs, curve, color=COLOURS[kind], alpha=0.3, linewidth=0.8)
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, mean, color=COLOURS[kind], linewidth=2, label=f"{kind} depth")


def _seconds(axes, comparison: Comparison, runs: dict[str, list[Run]]) -> None:
    """Every epoch a point, the medians as bars, and where the FLOPs say the saving should be."""
    medians = {}
    for position, kind in enumerate(KINDS):
        values = [record.seconds for run in runs[kind] for record in run.records()]
        medians[kind] = statistics.median(values)
        axes.bar(position, medians[kind], 0.6, color=COLOURS[kind], alpha=0.35)
        spread = [position + 0.4 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axes.scatter(spread, values, 6, color=COLOURS[kind], alpha=0.7)
    expected = medians["constant"] * (1 - comparison.saving_expected)
    axes.hlines(expected, 0.6, 1.45, color="black", linestyle="--")
    axes.annotate("expected", (1.47, expected), va="center")
    axes.set_xlim(-0.5, 2)
    axes.set_ylim(0, 1.3 * medians["constant"])
    axes.set_xticks(range(len(KINDS)), [f"{kind} depth" for kind in KINDS])
    axes.set(
        title=f"Time saved: {100 * comparison.saving_measured:.1f} %, "
        f"expected {100 * comparison.saving_expected:.1f} %",
        ylabel="seconds an epoch",
    )
