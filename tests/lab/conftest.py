"""Short real runs, and beside them the files that sweeps and analyses leave."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stochastic_depth.choices import SweepKind
from stochastic_depth.lab.analyses import write_analysis
from stochastic_depth.lab.comparison import train_pairs
from stochastic_depth.lab.experiments import Experiment, experiments
from stochastic_depth.lab.page import write_report
from stochastic_depth.lab.recorded import read_sources
from stochastic_depth.lab.sweep.folder import open_sweep
from stochastic_depth.lab.sweep.grid import Grid
from stochastic_depth.lab.sweep.workers import train_point
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig, OptimizerConfig, Run
from support.runs import append_records, edit_description, unseen

SMALL = replace(RECIPES["digits"](), model=ModelConfig(depth=14), epochs=2)
"""Six blocks, two epochs."""
HOSTILE = "</script><img src=x onerror=document.title='taken'>\"'&{{7*7}}"


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """ResNet-14, constant and stochastic depth, one seed: {"constant": [Run], ...}."""
    config = replace(
        RECIPES["digits"](),
        model=ModelConfig(depth=14),
        optimizer=OptimizerConfig(batch=64),
        epochs=4,
        engine="eager",
    )
    return train_pairs(config, [0], tmp_path_factory.mktemp("trained"), unseen(), lambda: None)


@pytest.fixture
def silent():
    """Progress that nobody sees."""
    return lambda doing, done, total: None


def put_hostile(described: dict[str, Any]) -> None:
    described["config"]["recipe"] = HOSTILE
    described["machine"]["processor"] = HOSTILE
    described["git_commit"] = HOSTILE


@pytest.fixture(scope="session")
def hostile(compared, tmp_path_factory) -> tuple[str, Path]:
    """A name, and a folder of runs that have it wherever a name can stand."""
    folder = tmp_path_factory.mktemp("hostile")
    for source in sorted(compared.glob("*-seed0")):
        target = folder / f"{source.name}{HOSTILE}".replace("/", "")
        shutil.copytree(source, target)
        edit_description(target, put_hostile)
    return HOSTILE, folder


@pytest.fixture(scope="session")
def page(
    compared, survival_sweep, depth_sweep, gates_sweep, benchmark_file, tmp_path_factory
) -> Path:
    """A report of everything."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    sources = [compared, survival_sweep, depth_sweep, gates_sweep, benchmark_file]
    made = write_report(sources, out)
    assert made.commands == ()
    return out


@pytest.fixture(scope="session")
def hostile_page(hostile, tmp_path_factory) -> Path:
    """A report of names that would like to be markup."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_report([hostile[1]], out)
    return out


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Path:
    """A folder as `compare` leaves it, two seeds, with every analysis."""
    folder = tmp_path_factory.mktemp("compared")
    runs = train_pairs(SMALL, [0, 1], folder, unseen(), lambda: None)
    for kind, of_kind in runs.items():
        for seed, run in enumerate(of_kind):
            _described_anew(run, kind == "constant", seed)
            write_analysis(run, "pruning", _pruning())
    for run in runs["stochastic"]:
        write_analysis(run, "ensemble", _ensemble())
    return folder


@pytest.fixture(scope="session")
def survival_sweep(tmp_path_factory) -> Path:
    """Linear decay and uniform at two p_L, and constant depth."""
    grid = Grid(("linear", "uniform", "constant"), (0.5, 1.0), (14,), (0,))
    return _swept(tmp_path_factory.mktemp("survival"), "survival", grid)


@pytest.fixture(scope="session")
def depth_sweep(tmp_path_factory) -> Path:
    """Two depths at two p_L, and a copy of a run with a hostile name."""
    folder = _swept(
        tmp_path_factory.mktemp("depth"), "depth", Grid(("linear",), (0.5, 1.0), (8, 14), (0,))
    )
    runs = folder / "runs"
    shutil.copytree(runs / "linear-0.5-depth8-seed0", runs / HOSTILE.replace("/", ""))
    return folder


@pytest.fixture(scope="session")
def gates_sweep(tmp_path_factory) -> Path:
    """Constant depth and one coin a batch."""
    grid = Grid(("linear",), (0.5,), (14,), (0,), ("constant", "batch"))
    return _swept(tmp_path_factory.mktemp("gates"), "gates", grid)


@pytest.fixture(scope="session")
def benchmark_file(tmp_path_factory) -> Path:
    """As `bench depth --out` writes it."""
    path = tmp_path_factory.mktemp("bench") / "depth.json"
    line = {"slope": 1e-4, "intercept": 0.0, "r_squared": 1.0}
    kinds = {"constant": 1.0, "stochastic": 0.75}
    content = {
        "settings": {"batch": 4, "size": 16},
        "depths": [20, 56],
        "seconds_per_image": {k: [[s * 0.002] * 3, [s * 0.0056] * 3] for k, s in kinds.items()},
        "bytes_per_image": {k: [s * 2**20, s * 3 * 2**20] for k, s in kinds.items()},
        "lines": {what: dict.fromkeys(kinds, line) for what in ("seconds", "memory")},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def experiment(compared) -> Experiment:
    (found,) = experiments(read_sources([compared]).runs)
    return found


def _swept(folder: Path, kind: SweepKind, grid: Grid) -> Path:
    sweep = open_sweep(folder, kind, grid, replace(SMALL, epochs=1))
    for point in grid.points():
        train_point(sweep, point, lambda: None)
    return folder


def _described_anew(run: Run, constant: bool, seed: int) -> None:
    """Gradients and gates as of longer runs, and times that do not depend on the machine's load."""
    records = [
        replace(
            record,
            seconds=(2.0 if constant else 1.2) + 0.2 * seed + 0.1 * epoch,
            block_gradients=[0.01 / block for block in range(1, 6)] + [None],
            active_counts={"6": 10} if constant else {"3": 2, "4": 5, "5": 3},
        )
        for epoch, record in enumerate(run.records())
    ]
    run.journal.unlink()
    append_records(run.journal, run.id, records)


def _ensemble() -> dict:
    def predictor(name: str, members: int, error: float) -> dict:
        numbers = {"error": error, "nll": error / 10, "ece": error / 100}
        return {"name": name, "members": members, **numbers} | {
            f"{measure}_deviation": None for measure in numbers
        }

    return {
        "checkpoint_step": 20,
        "images": 300,
        "seed": 0,
        "subnetworks": 64,
        "predictors": [
            predictor("scaled", 1, 5.0),
            predictor("single", 1, 7.0),
            predictor("unscaled", 1, 6.0),
            *(predictor("mean", 2**n, 4.5 + 2.5 / 2**n) for n in range(7)),
        ],
    }


def _pruning() -> dict:
    return {
        "checkpoint_step": 20,
        "blocks": 6,
        "images": 300,
        "curves": [
            {
                "order": order,
                "recalibrated": recalibrated,
                "points": [
                    {
                        "removed": k,
                        "blocks": list(range(7 - k, 7)),
                        "error": 5 * math.exp(k / (4 if recalibrated else 2)),
                        "validation_error": 5.0,
                        "parameters": 1000 - 100 * k,
                        "seconds_per_image": 0.001 - 0.0001 * k,
                    }
                    for k in range(7)
                ],
            }
            for order in ("last", "least needed")
            for recalibrated in (False, True)
        ],
    }
