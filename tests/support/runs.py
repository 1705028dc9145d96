"""Train and interrupt runs, and compare how they ended, bit for bit."""

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
from stochastic_depth.lab.experiments import Experiment
from stochastic_depth.train import Record, begin, fit, reopen
from stochastic_depth.train.checkpoint import load_checkpoint
from stochastic_depth.train.display import Display, Silent
from stochastic_depth.train.engine_choice import EngineName
from stochastic_depth.train.journal import append_record
from stochastic_depth.train.run_folder import checksum

SILENT = Silent()
CLOCK = {"seconds", "images_per_second", "peak_memory", "elsewhere"}
"""The fields of a record that are not the same whenever a run is repeated."""
STATE = {"run": "a", "step": 7, "weights": torch.arange(50.0), "nested": [1, {"x": None}]}
"""What a checkpoint holds."""


def finish(path, config, callback):
    """A new run at `path` and its records, after training it to its end."""
    run, images = begin(config, path)
    return run, list(fit(run, images, callback))


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
    """What a finished run has trained, without what was measured by a clock."""
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


def interrupted_and_resumed(path, config, stops):
    """The run at `path`, which a signal stops after each of the steps `stops`, and which is then
    resumed to its end."""
    run, images = begin(config, path)
    for step in stops:
        stop_after(step, run, images)
        run, images = reopen(path)
    list(fit(run, images, SILENT))
    return run


def stop_after(step, run, images):
    """Train a run until a signal stops it after `step`."""

    class Steps(Silent):
        done = -1

        def step(self, train_state, loss):
            self.done = train_state.step

    steps = Steps()
    with pytest.raises(Interrupted) as interrupted:
        list(fit(run, images, steps, lambda: 15 if steps.done >= step else None))
    assert interrupted.value.signal == 15
    assert run.checkpoints.steps()[0] == step


def last_checksum(path: Path, run_id: str) -> str:
    """The checksum of the last line of a journal; the identity of the run if it has none."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["sha256"] if lines else run_id


def append_records(path: Path, run_id: str, records: Iterable[Record]) -> None:
    for each in records:
        append_record(path, each, last_checksum(path, run_id))


def record(step: int, error: float = 1.0) -> Record:
    values = {field.name: 0.5 for field in dataclasses.fields(Record)}
    return Record(**{**values, "step": step, "validation_error": error, "peak_memory": 1})
