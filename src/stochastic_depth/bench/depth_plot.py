"""The picture of time and memory against depth."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from stochastic_depth.bench.depth import KINDS, Line
from stochastic_depth.extras import require
from stochastic_depth.timing import Timing
from stochastic_depth.train.files import write_whole

COLOURS = {"constant": "#8a6d3b", "stochastic": "#1f6feb"}


def plot_depth(
    path: Path,
    title: str,
    depths: Sequence[int],
    seconds: Mapping[str, Sequence[Timing]],
    memory: Mapping[str, Sequence[float]],
    lines: Mapping[str, Mapping[str, Line]],
) -> None:
    """Seconds and bytes an image against depth, with the fitted lines, as PNG.

    Args:
        seconds: by kind, an image's at each depth: the median a point, the quartiles a bar.
        memory: by kind, an image's bytes at each depth.
        lines: by "seconds" and "memory", then by kind.
    """
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title)
    time, space = figure.subplots(1, 2)
    for kind in KINDS:
        style = {"color": COLOURS[kind], "marker": "o", "linestyle": "none"}
        medians = [1e3 * timing.median for timing in seconds[kind]]
        quartiles = [[1e3 * q for q in timing.quartiles] for timing in seconds[kind]]
        below = [max(0.0, m - q[0]) for m, q in zip(medians, quartiles, strict=True)]
        above = [max(0.0, q[1] - m) for m, q in zip(medians, quartiles, strict=True)]
        time.errorbar(depths, medians, [below, above], label=f"{kind} depth", **style)
        space.plot(depths, [count / 2**20 for count in memory[kind]], **style)
        for axes, what, unit in ((time, "seconds", 1e3), (space, "memory", 2**-20)):
            line = lines[what][kind]
            ends = [unit * (line.slope * depth + line.intercept) for depth in (0, depths[-1])]
            axes.plot((0, depths[-1]), ends, color=COLOURS[kind], alpha=0.5)
    time.set(title="Time of a training step", xlabel="layers", ylabel="milliseconds an image")
    space.set(title="Peak memory", xlabel="layers", ylabel="MiB an image")
    time.legend(frameon=False)
    for axes in (time, space):
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_whole(path, buffer.getvalue())
