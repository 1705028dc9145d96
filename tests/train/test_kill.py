"""A run that is killed at random moments ends, bit for bit, where it would have ended."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from stochastic_depth.cli import main
from stochastic_depth.train import open_run
from support.forked import command_line, torchrun
from support.processes import forked, program
from support.runs import assert_same_end

OPTIONS = ["--model.depth", "8", "--data.train", "300", "--epochs", "10", "--evaluate-every", "2"]


def train(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stochastic_depth", "train", *map(str, arguments)],
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


def finish(process: BaseProcess, output: Path) -> None:
    process.join()
    assert process.exitcode == 0, output.read_text()


@pytest.fixture
def observed(tmp_path):
    """`observed()`: what an observer saw of `tmp_path / "killed"` up to then."""
    process = subprocess.Popen(
        [sys.executable, program("observer"), tmp_path / "killed"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield lambda: json.loads(process.communicate()[0])
        process.kill()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_ends_where_it_would_have(tmp_path, observed, soak, counts):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    output = tmp_path / "output.txt"
    begin = ["digits", *OPTIONS, "--epochs", "16", "--run"]
    durations = []
    # The second finds nothing to do: the time it takes is that of every start.
    for arguments in ([*begin, undisturbed], ["--resume", undisturbed]):
        began = time.monotonic()
        finish(forked(command_line, "train", *arguments, output=output), output)
        durations.append(time.monotonic() - began)
    training, start = durations[0] - durations[1], durations[1]

    wanted, kills, moments = 100 if soak else 3, 0, random.Random(0)
    going_on = ["--resume", killed]
    while kills < wanted and not (killed / "model.safetensors").exists():
        arguments = going_on if killed.exists() else [*begin, killed]
        process = forked(command_line, "train", *arguments, output=output)
        time.sleep(moments.uniform(0, start + training / wanted))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), output.read_text()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > wanted / 2
    arguments = going_on if killed.exists() else [*begin, killed]
    finish(forked(command_line, "train", *arguments, output=output), output)

    assert_as_undisturbed(undisturbed, killed, observed(), counts)
    counts["kills of a run, which ended bit for bit as undisturbed"] += kills


def assert_as_undisturbed(undisturbed: Path, killed: Path, saw: dict, counts: Counter) -> None:
    assert saw["wrong"] == []
    assert saw["looks"] > 0
    assert_same_end(open_run(undisturbed), open_run(killed))
    assert not list(killed.rglob(".unfinished-*"))
    counts["looks at the folders of killed runs, every file whole"] += saw["looks"]
    counts["files seen in them"] += saw["files"]


class Group:
    """A run of two processes under torchrun's agent, which starts both anew when one dies."""

    def __init__(self, run: Path, restarts: int, epochs: int) -> None:
        options = [*OPTIONS, "--epochs", epochs, "--run", run]
        self.run, self.output = run, run.with_suffix(".txt")
        arguments = ["train", "digits", *options]
        self.agent = forked(torchrun, restarts, *arguments, output=self.output)

    def workers(self, besides: Sequence[int] = ()) -> list[int]:
        """Their process ids, once there are two others than `besides`; none when all has ended."""
        while self.agent.is_alive():
            with suppress(FileNotFoundError):
                children = Path(f"/proc/{self.agent.pid}/task").glob("*/children")
                found = sorted(int(pid) for path in children for pid in path.read_text().split())
                if len(found) == 2 and not {*found} & {*besides}:
                    return found
            time.sleep(0.002)
        return []

    def wait_for_checkpoint(self, at_most: float = math.inf) -> None:
        """Until there is another one, all has ended, or `at_most` seconds are over."""
        before, end = set(self.run.glob("checkpoints/step-*")), time.monotonic() + at_most
        while self.agent.is_alive() and time.monotonic() < end:
            if not before >= {*self.run.glob("checkpoints/step-*")}:
                break
            time.sleep(0.002)

    def finish(self) -> None:
        finish(self.agent, self.output)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_group_of_two_killed_at_random_moments_ends_where_it_would_have(
    tmp_path, observed, soak, counts
):
    wanted, epochs, moments = 100 if soak else 2, 50 if soak else 4, random.Random(0)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    group, kills = Group(undisturbed, 0, epochs), 0
    began = group.workers() and time.monotonic()
    group.wait_for_checkpoint()
    start = time.monotonic() - began
    group.finish()
    interval = (time.monotonic() - began - start) / (5 * epochs)

    group = Group(killed, wanted, epochs)
    workers = group.workers()
    while kills < wanted and workers:
        group.wait_for_checkpoint(at_most=moments.uniform(0, 2 * start))
        time.sleep(moments.uniform(0, interval))
        for victim in moments.choice([workers[:1], workers[1:], workers]):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        workers = group.workers(besides=workers)
        kills += bool(workers)  # else it had come to its end
    group.finish()
    assert kills >= wanted / 2
    assert_as_undisturbed(undisturbed, killed, observed(), counts)
    counts["kills of one of two processes or both, which ended bit for bit as undisturbed"] += kills


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_tells_how_to_go_on(tmp_path, number):
    process = train("digits", *OPTIONS, "--run", tmp_path / "run", "--epochs", "100")
    has_begun(process)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate()
    assert process.returncode == 128 + number
    assert "with a checkpoint" in output
    assert f"stochastic-depth train --resume {tmp_path / 'run'}" in output
    assert "Traceback" not in output
    assert open_run(tmp_path / "run").checkpoints.steps()


def test_a_second_process_is_told_that_the_folder_is_being_written(tmp_path, capsys):
    process = train("digits", *OPTIONS, "--run", tmp_path / "run", "--epochs", "1000")
    has_begun(process)
    while not (tmp_path / "run" / "lock").exists():
        assert process.poll() is None
        time.sleep(0.02)
    code = main(["train", "--resume", str(tmp_path / "run")])
    process.kill()
    process.communicate()
    assert code == 1
    assert "being written by another process" in capsys.readouterr().err
