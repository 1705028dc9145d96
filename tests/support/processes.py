"""Programs that tests start in processes of their own."""

import os
import sys
from pathlib import Path


def program(name: str) -> Path:
    """A file of this folder."""
    return Path(__file__).with_name(f"{name}.py")


def environment() -> dict[str, str]:
    """Of a process that can import what this one can, and has one thread."""
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
