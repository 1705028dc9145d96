"""Files that lie about themselves: one error each, in bounded memory and time."""

import json
import subprocess
import sys

import pytest

from support.processes import environment, program

MOST_MEMORY = 600 * 2**20
MOST_SECONDS = 60


@pytest.fixture(scope="module")
def shown():
    """What each hostile file came to."""
    command = [sys.executable, program("hostile")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_hostile_file_is_one_error_in_bounded_memory_and_time(shown, counts):
    for case in shown:
        assert case["ours"], case
        assert case["names the file"], case
        assert len(case["error"]) < 1000, case
        assert case["memory"] < MOST_MEMORY, case
        assert case["seconds"] < MOST_SECONDS, case
    assert len(shown) >= 50
    largest = max(shown, key=lambda case: case["memory"])
    counts["hostile files refused"] += len(shown)
    counts[f"bytes of memory for the worst of them ({largest['name']})"] = largest["memory"]
