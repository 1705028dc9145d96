"""Files that lie about themselves: one error each, in bounded memory and time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MOST_MEMORY = 600 * 2**20
MOST_SECONDS = 60


@pytest.fixture(scope="module")
def told():
    """What each hostile file came to."""
    # From the folder whose conftest makes torchvision importable.
    done = subprocess.run(
        [sys.executable, "-c", "import conftest, hostile; hostile.main()"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{HERE}",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_hostile_file_is_one_error_in_bounded_memory_and_time(told, counts):
    for case in told:
        assert case["ours"], case
        assert case["names the file"], case
        assert len(case["error"]) < 1000, case
        assert case["memory"] < MOST_MEMORY, case
        assert case["seconds"] < MOST_SECONDS, case
    assert len(told) > 70
    largest = max(told, key=lambda case: case["memory"])
    counts["hostile files refused"] += len(told)
    counts[f"bytes of memory for the worst of them ({largest['name']})"] = largest["memory"]
