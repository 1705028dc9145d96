"""The names of the files in a run folder. This module does not need PyTorch."""

from pathlib import Path

from stochastic_depth.errors import RunError
from stochastic_depth.files import is_there

CONFIG = "config.json"
"""The configuration and where it runs."""
JOURNAL = "metrics.jsonl"
"""A line for each evaluation."""
CHECKPOINTS = "checkpoints"
"""The folder of checkpoints."""
WEIGHTS = "model.safetensors"
"""The weights at the end."""
FAILED = "failed.txt"
"""Why a run of a sweep cannot be trained."""
ANALYSIS = "analysis"
"""The folder of results of `analyze`."""
LOCK = "lock"
"""Held by the process that writes."""


def has_lost_config(path: Path) -> bool:
    """Whether a folder has the other files of a run, and no `config.json`."""
    trained = is_there(path / WEIGHTS) or is_there(path / CHECKPOINTS)
    return trained and is_there(path / JOURNAL) and not is_there(path / CONFIG)


def lost_config(path: Path) -> RunError:
    """The error for a run folder that has lost its `config.json`."""
    return RunError(
        f"{path} has lost its {CONFIG}: put a copy in its place; or remove {path}, and train it "
        "again"
    )


def with_name(run: Path) -> Path:
    """The path of a run folder so that it ends with a name, which `.` and `..` do not."""
    return run.resolve() if run.name in ("", "..") else run
