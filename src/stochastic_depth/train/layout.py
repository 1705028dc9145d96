"""The names of the files in a run folder. This module does not need PyTorch."""

from pathlib import Path

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


def with_name(run: Path) -> Path:
    """The path of a run folder so that it ends with a name, which `.` and `..` do not."""
    return run.resolve() if run.name in ("", "..") else run
