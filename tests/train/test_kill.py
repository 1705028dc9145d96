"""A run that is killed at random moments ends, bit for bit, where it would have ended."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from test_fit import assert_same_end

from stochastic_depth.train import open_run

KILLS = int(os.environ.get("STOCHASTIC_DEPTH_KILLS", "5"))
OPTIONS = ["--model.depth", "20", "--epochs", "12", "--evaluate-every", "3"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stochastic_depth", *map(str, arguments)]


def train(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("train", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def has_begun(process: subprocess.Popen[str]) -> None:
    """Wait for the line that comes when the data is read and training begins."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "→" in line, line + process.stdout.read()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate()
    return process.returncode, output


def test_a_run_killed_at_random_moments_ends_where_it_would_have(tmp_path):
    undisturbed = tmp_path / "undisturbed"
    process = train("digits", *OPTIONS, "--run", undisturbed)
    has_begun(process)
    began = time.monotonic()
    assert finish(process)[0] == 0
    duration = time.monotonic() - began

    moments, killed = random.Random(0), tmp_path / "killed"
    process = train("digits", *OPTIONS, "--run", killed)
    kills = 0
    while kills < KILLS:
        has_begun(process)
        time.sleep(moments.uniform(0, 1.5 * duration / KILLS))
        process.kill()
        kills += finish(process)[0] == -signal.SIGKILL
        assert not [p for p in (killed / "checkpoints").glob("step-*") if p.stat().st_size == 0]
        process = train("--resume", killed)
        if (killed / "model.safetensors").exists():
            break
    assert finish(process)[0] == 0
    print(f"{kills} kills")
    assert_same_end(open_run(undisturbed), open_run(killed))
    assert not list(killed.rglob(".unfinished-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_tells_how_to_go_on(tmp_path, number):
    process = train("digits", *OPTIONS, "--run", tmp_path / "run", "--epochs", "100")
    has_begun(process)
    time.sleep(1)
    process.send_signal(number)
    code, output = finish(process)
    assert code == 128 + number
    assert "with a checkpoint" in output
    assert f"stochastic-depth train --resume {tmp_path / 'run'}" in output
    assert "Traceback" not in output
    assert open_run(tmp_path / "run").checkpoints.steps()


def test_a_second_process_is_told_that_the_folder_is_being_written(tmp_path):
    process = train("digits", *OPTIONS, "--run", tmp_path / "run", "--epochs", "1000")
    has_begun(process)
    while not (tmp_path / "run" / "lock").exists():
        time.sleep(0.1)
    second = subprocess.run(
        command("train", "--resume", tmp_path / "run"), capture_output=True, text=True
    )
    process.kill()
    finish(process)
    assert second.returncode == 1
    assert "being written by another process" in second.stderr
    assert "Traceback" not in second.stderr
