"""Runs from beginning to end, and whether two of them ended alike, bit for bit."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from stochastic_depth.errors import Interrupted
from stochastic_depth.lab.outcomes import Experiment
from stochastic_depth.train import Record, begin, fit, reopen
from stochastic_depth.train.checkpoint import load_checkpoint
from stochastic_depth.train.display import Display, Silent
from stochastic_depth.train.engine_choice import EngineName
from stochastic_depth.train.journal import append_record
from stochastic_depth.train.run_folder import checksum

SILENT = Silent()
CLOCK = {"seconds", "images_per_second", "peak_memory"}
STATE = {"run": "a", "step": 7, "weights": torch.arange(50.0), "nested": [1, {"x": None}]}
"""Of a checkpoint."""


def finish(path, config, watch):
    run, images = begin(config, path)
    return run, list(fit(run, images, watch))


def unseen():
    """A display that shows nothing, for runs in pairs."""
    return Display(Console(quiet=True), quiet=True)


def edit_description(run: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the `config.json` of a run, and its checksum with it."""
    described = json.loads((run / "config.json").read_text())
    edit(described)
    del described["sha256"]
    described["sha256"] = checksum(described)
    (run / "config.json").write_text(json.dumps(described))


def trained_by(experiment: Experiment, engine: EngineName) -> Experiment:
    """The experiment, as if another engine had trained the runs of its last series."""
    *others, last = experiment.series
    runs = [
        replace(one, run=replace(one.run, runtime=replace(one.run.runtime, engine=engine)))
        for one in last.runs
    ]
    return replace(experiment, series=(*others, replace(last, runs=tuple(runs))))


def without_clock(records):
    return [
        {k: v for k, v in dataclasses.asdict(record).items() if k not in CLOCK}
        for record in records
    ]


def end_state(run):
    """All that a run ends with and the clock does not touch."""
    state = load_checkpoint(run.checkpoints.path(run.checkpoints.steps()[0]), run.id)
    tensors = {f"model.{k}": v for k, v in state["model"].items()}
    for number, values in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{number}.{k}": v for k, v in values.items()}
    tensors |= {f"weights.{k}": v for k, v in load_file(run.weights).items()}
    return tensors, state["handle"], state["optimizer"]["param_groups"]


def assert_same_end(run, other):
    (tensors, gates, groups), (tensors2, gates2, groups2) = end_state(run), end_state(other)
    assert tensors.keys() == tensors2.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, tensors2[name]), name
    assert gates == gates2
    assert groups == groups2
    assert without_clock(run.records()) == without_clock(other.records())


def interrupted_and_resumed(path, config, watch, stops):
    """The run at `path`, stopped by a signal after each of `stops` steps and gone on with."""
    run, images = begin(config, path)
    for stop_at in stops:
        asked = iter(range(10**9))
        steps = []

        class Counting(type(watch)):
            def step(self, training, loss, steps=steps):
                steps.append(training.step)

        def stop(steps=steps, stop_at=stop_at, asked=asked):
            next(asked)
            return 15 if steps and steps[-1] >= stop_at else None

        with pytest.raises(Interrupted) as interrupted:
            list(fit(run, images, Counting(), stop))
        assert interrupted.value.signal == 15
        assert run.checkpoints.steps()[0] == stop_at
        run, images = reopen(path)
    list(fit(run, images, watch))
    return run


def last_checksum(path: Path, run_id: str) -> str:
    """What the next line of a journal is written after."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["sha256"] if lines else run_id


def append_records(path: Path, run_id: str, records: Iterable[Record]) -> None:
    for each in records:
        append_record(path, each, last_checksum(path, run_id))


def record(step: int, error: float = 1.0) -> Record:
    values = {field.name: 0.5 for field in dataclasses.fields(Record)}
    return Record(**{**values, "step": step, "validation_error": error, "peak_memory": 1})
