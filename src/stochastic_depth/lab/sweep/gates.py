"""The results of each gating: test error over seeds, and the cost of a training step."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stochastic_depth.errors import RunError
from stochastic_depth.files import is_there, write_whole
from stochastic_depth.lab.bench.costs import step_costs
from stochastic_depth.lab.bench.workload import Step, Workload, training_step
from stochastic_depth.lab.formatting import percent
from stochastic_depth.lab.outcomes import RunOutcome, Spread, describe
from stochastic_depth.lab.sources import read_json
from stochastic_depth.lab.sweep.folder import Sweep
from stochastic_depth.recipes.paper import gatings
from stochastic_depth.train import Config, open_run
from stochastic_depth.train.build import apply_survival, build_model
from stochastic_depth.train.runtime import Runtime, machine, resolve_runtime, versions

CONSTANT_GATING = "constant"
FILE = "gates.json"
"""The file in the sweep's folder that is written when the sweep is complete."""


def gating_steps(
    config: Config,
    names: Sequence[str],
    runtime: Runtime,
    steps: int,
    shape: tuple[int, int, int],
    classes: int,
) -> dict[str, Step]:
    """A training step of each gating, by autograd, on random images of the data's shape.

    Args:
        steps: the number of steps of the whole training, which a schedule needs.
        shape: the shape of an image, (channels, height, width), which is square.
        classes: how many classes the images have.
    """
    channels, side, _ = shape
    workload = Workload(config.optimizer.batch, side, channels, runtime)
    found = {}
    for name in names:
        variant = gatings(config)[name]
        model = build_model(variant.model, channels, classes, config.seed)
        apply_survival(model, variant.survival, config.seed, steps)
        labels = torch.arange(workload.batch) % classes
        found[name] = training_step(model, workload.images(), labels, runtime)
    return found


def gating_results(sweep: Sweep, console: Console, repeats: int = 30) -> dict[str, Any]:
    """The errors of the finished runs and the cost of a step, by gating, for a file.

    At least one run must be finished: its images have the shape and the classes to measure with.
    Costs are means over a whole training run of `repeats` steps, so that a schedule is passed
    through.
    """
    config, survival = sweep.config, sweep.grid.survival[0]
    config = replace(config, survival=replace(config.survival, final=survival))
    runtime = resolve_runtime(config)
    # Costs are relative to constant depth.
    names = dict.fromkeys((CONSTANT_GATING, *sweep.grid.gatings))
    trained = open_run(sweep.path(next(filter(sweep.done, sweep.grid.points()))))
    shape, classes = trained.shape, len(trained.classes)
    costs = step_costs(
        lambda: gating_steps(config, [*names], runtime, repeats, shape, classes),
        repeats,
        runtime,
        console,
    )
    rows = {}
    for name in sweep.grid.gatings:
        points = [point for point in sweep.grid.points() if point.gating == name]
        journals = [sweep.records(point) for point in points if sweep.done(point)]
        if not journals:
            continue
        outcomes = list(map(RunOutcome.of, journals))
        rows[name] = {
            "test_errors": [outcome.test_error_best for outcome in outcomes],
            "test_errors_last": [outcome.test_error_last for outcome in outcomes],
            "step": asdict(costs[name]),
            "relative": asdict(costs[name].relative_to(costs[CONSTANT_GATING])),
        }
    return {
        "title": describe(config),
        "p_L": survival,
        "steps_measured": repeats,
        "gatings": rows,
        "config": config.without_io().to_json(),
        "machine": machine(runtime),
        "versions": versions(),
    }


def write_results(sweep: Sweep, result: dict[str, Any]) -> None:
    """Write the results into the folder of the sweep."""
    write_whole(sweep.folder / FILE, json.dumps(result, indent=1).encode() + b"\n")


def read_results(folder: Path) -> dict[str, Any] | None:
    """The results that `write_results` wrote; None while there are none.

    Raises:
        RunError: when the file cannot be read, or is something else.
    """
    path = folder / FILE
    if not is_there(path):
        return None
    content = read_json(path)
    if not {"title", "p_L", "gatings"} <= content.keys():
        raise RunError(
            f"{path} is not what sweep gates writes: remove it, and give the command of the sweep "
            "again"
        )
    return content


def gates_table(result: dict[str, Any]) -> Table:
    """A row for each gating: errors over seeds, and costs as shares of those of constant depth."""
    table = Table(
        title=f"{result['title']}, p_L = {result['p_L']:g}; mean ± deviation over seeds",
        title_justify="left",
        caption="time, FLOPs, bytes kept for backward and their peak: of constant depth's, over "
        f"{result['steps_measured']} steps",
        caption_justify="left",
    )
    table.add_column("gating")
    for name in ("seeds", "test error", "time", "FLOPs", "bytes", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in result["gatings"].items():
        shares = (f"{share:.3f}" for share in row["relative"].values())
        errors = row["test_errors"]
        table.add_row(name, f"{len(errors)}", percent(Spread.of(errors)), *shares)
    return table
