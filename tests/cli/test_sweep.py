import json
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from operator import length_hint
from pathlib import Path

import pytest
from filelock import FileLock

from stochastic_depth.cli import main
from stochastic_depth.lab.sweep import workers
from stochastic_depth.lab.sweep.workers import Workers
from stochastic_depth.train import open_run

SMALL = "--model.depth 8 --data.train 300 --epochs 2 --evaluate-every 3 --threads 1".split()
SURVIVAL = ["sweep", "survival", "digits", *SMALL, "--survival", "0.2", "--seeds", "2"]


def files(folder):
    return {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}


def test_a_sweep_tells_each_run_and_then_means_and_deviations(tmp_path, capsys):
    assert main([*SURVIVAL, "--rules", "uniform", "constant"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("1/4 done, ")
    assert lines[3].startswith("4/4 done, 0 running, 0 failed, left 0:00:00  ")
    folder = tmp_path / "runs" / "sweep-survival-digits"
    runs = [open_run(path) for path in sorted((folder / "runs").iterdir())]
    assert [(run.config.survival.rule, run.config.seed) for run in runs] == [
        ("constant", 0), ("constant", 1), ("uniform", 0), ("uniform", 1),
    ]  # fmt: skip
    best = [min(run.records(), key=lambda r: r.validation_error).test_error for run in runs]
    (uniform,) = (line for line in lines if line.startswith("│ uniform"))
    mean, deviation = (best[2] + best[3]) / 2, abs(best[2] - best[3]) / 2**0.5
    assert f"│ {mean:.2f} ± {deviation:.2f} % │" in uniform
    assert uniform.startswith("│ uniform  │     2 │")
    before = files(folder)
    assert main([*SURVIVAL, "--rules", "uniform", "constant", "--quiet"]) == 0
    assert files(folder) == before
    assert capsys.readouterr().out.splitlines()[0].startswith("digits, cifar-resnet, p_L 0.2,")
    assert main([*SURVIVAL, "--rules", "uniform"]) == 1
    assert "another sweep: its grid.rules is" in capsys.readouterr().err


def test_the_same_command_in_another_terminal_joins(tmp_path):
    command = [sys.executable, "-m", "stochastic_depth", *SURVIVAL, "--workers", "1"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shown = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(text.count(" done, ") == 6 for text in shown)
    assert all("0 failed" in text for text in shown)
    described = json.loads((tmp_path / "runs/sweep-survival-digits/sweep.json").read_text())
    assert described["grid"]["rules"] == ["linear", "uniform", "constant"]


@pytest.fixture
def begun(tmp_path):
    """A sweep of hours with two workers, just begun in a session of its own; and its folder."""
    command = [sys.executable, "-m", "stochastic_depth", *SURVIVAL, "--epochs", "9999"]
    with subprocess.Popen(
        [*command, "--workers", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        yield process, tmp_path / "runs" / "sweep-survival-digits"
        process.kill()


def wait_until(process, condition):
    """Wait while the process runs."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture
def long(begun):
    """The same when both workers are in a run."""
    process, folder = begun
    wait_until(process, lambda: len(list(folder.glob("runs/*/metrics.jsonl"))) == 2)
    return begun


def assert_ends_on_ctrl_c(process):
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT
    assert "6 of 6 runs are not finished" in shown
    assert "resume:  stochastic-depth sweep survival digits" in shown
    assert "Traceback" not in shown


def test_ctrl_c_leaves_checkpoints_and_tells_how_to_go_on(long):
    process, folder = long
    assert_ends_on_ctrl_c(process)
    for path in (folder / "runs").iterdir():
        run = open_run(path)
        with run.writing():
            assert run.checkpoints.steps()[0] >= run.records()[-1].step


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the processes of a session")
def test_ctrl_c_while_workers_start_ends_the_sweep_and_leaves_no_process(begun):
    process, _ = begun
    # The server process of the workers imports PyTorch, and the command waits for it.
    wait_until(process, lambda: any("forkserver" in each for each in commands_in(process.pid)))
    assert_ends_on_ctrl_c(process)
    while commands_in(process.pid):  # the server process ends when it notices
        time.sleep(0.02)


def commands_in(session):
    """The command lines of the processes of a session that have not ended."""
    shown = ["ps", "-o", "args=", "--sid", str(session)]
    lines = subprocess.run(shown, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "<defunct>" not in line]


def test_workers_whose_command_is_killed_stop_with_a_checkpoint(long):
    process, folder = long
    process.kill()
    for path in sorted((folder / "runs").iterdir()):
        run = open_run(path)
        with FileLock(path / "lock", timeout=60):
            assert run.checkpoints.steps()[0] >= run.records()[-1].step


def test_depths_are_swept(tmp_path):
    small = SMALL[2:]
    grid = ["--depths", "8", "14", "--survival", "0.5", "--seeds", "1"]
    assert main(["sweep", "depth", "digits", *small, *grid, "--out", "mine", "--quiet"]) == 0
    runs = sorted(path.name for path in (tmp_path / "mine" / "runs").iterdir())
    assert runs == ["linear-0.5-depth14-seed0", "linear-0.5-depth8-seed0"]


def test_a_sweep_of_which_every_run_failed_tells_why_and_is_an_error(capsys):
    assert main([*SURVIVAL, "--rules", "constant", "--optimizer.learning-rate", "1e30"]) == 1
    shown = capsys.readouterr().out
    assert "0/2 done, 0 running, 2 failed" in shown
    failure = "constant-depth8-seed1 failed: with blocks 1-3 of 3 open, the loss is not finite"
    assert failure in shown
    assert "0 of 2" in shown


def test_a_sweep_that_cannot_go_on_says_how_to(tmp_path, capfd):
    forkserver._forkserver._stop()  # what workers print goes where the next one prints
    arguments = [*SURVIVAL, "--rules", "constant", "--quiet"]
    assert main(arguments) == 0
    run = tmp_path / "runs/sweep-survival-digits/runs/constant-depth8-seed1"
    for name in ("model.safetensors", "config.json"):
        (run / name).unlink()
    capfd.readouterr()
    assert main(arguments) == 1
    shown = capfd.readouterr()
    assert "constant-depth8-seed1 has lost its config.json" in shown.err
    assert "1 of 2 runs are not finished" in shown.out
    assert f"resume:  stochastic-depth {' '.join(arguments)}" in shown.out


def test_each_worker_that_is_killed_is_told_once_by_its_own_signal(monkeypatch, capsys):
    rounds = iter([[], [9], [15, 9], [15, 9]])

    class Killed(Workers):
        def __enter__(self):
            return self

        def working(self):
            self.now = next(rounds)
            return length_hint(rounds) > 0

        def killed(self):
            return self.now

    monkeypatch.setattr(workers, "Workers", Killed)
    assert main([*SURVIVAL, "--rules", "constant"]) == 1
    told = re.findall(r"killed by signal (\d+)", capsys.readouterr().out)
    assert told == ["9", "15"]


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["survivel"], 2, "did you mean survival?"),
        (["survival", "digit"], 2, "did you mean digits"),
        (["survival", "digits", "--survival.final", "0.3"], 2, "give --survival instead"),
        (["survival", "digits", "--survival.rule=uniform"], 2, "give --rules instead"),
        (["depth", "digits", "--model.depth", "20"], 2, "give --depths instead"),
        (["gates", "digits", "--survival.no-balance"], 2, "give --gatings instead"),
        (["gates", "digits", "--schedule.until", "0.3"], 2, "give --gatings instead"),
        (["depth", "digits", "--model.growth", "24"], 2, "growth is 24, which has no effect"),
        (["survival", "--rules=constant", "--survival.gate=sample"], 2, "gate is sample, which"),
        (["survival", "--rules=constant", "--schedule", "early"], 2, "schedule is early, which"),
        (["depth", "digits-constant"], 2, "constant depth: sweep a stochastic one"),
        (["survival", "--survival", "0", "0.5"], 2, "--survival is 0.0: it must be above 0"),
        (["survival", "--survival"], 2, "the grid has no survival"),
        (["depth", "--depths", "21"], 1, "depth=21"),
        (["gates", "digits", "--engine", "program"], 1, "engine is program"),
        (["survival", "--workers", "0"], 2, "--workers is 0"),
        (["survival", "--seeds", "0"], 2, "--seeds is 0"),
        (["survival", "--threads", "0"], 2, "--threads is 0"),
    ],
)
def test_what_cannot_be_swept_is_one_line(arguments, code, shown, capsys):
    assert main(["sweep", *arguments]) == code
    error = capsys.readouterr().err
    assert shown in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_what_has_an_effect_in_a_part_of_the_grid_alone_is_swept(tmp_path, capsys):
    grid = ["--survival", "0.5", "--seeds", "1", "--rules", "constant", "linear", "--quiet"]
    command = ["sweep", "survival", "digits-constant", *SMALL, "--survival.gate", "sample"]
    assert main([*command, *grid]) == 0
    runs = [open_run(path) for path in (tmp_path / "runs").glob("*/runs/*")]
    assert {run.config.survival.gate for run in runs} == {"sample"}


def test_a_sweep_of_gates_has_a_row_for_each_gating_at_equal_rates(tmp_path, capsys):
    ways = ["constant", "balanced-batch", "forward-only", "early", "balanced-subset"]
    command = ["sweep", "gates", "digits", *SMALL, "--seeds", "1", "--gatings", *ways, "--quiet"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    runs = [open_run(path) for path in (tmp_path / "runs/sweep-gates-digits/runs").iterdir()]
    found = {
        (s.rule, s.gate, s.balance, s.closed, s.schedule.kind, s.final)
        for s in (run.config.survival for run in runs)
    }
    assert found == {
        ("constant", "batch", False, "skipped", "none", 0.5),
        ("linear", "batch", True, "skipped", "none", 0.5),
        ("linear", "batch", False, "forward-only", "none", 0.5),
        ("linear", "batch", False, "skipped", "early", 0.5),
        ("linear", "subset", True, "skipped", "none", 0.5),
    }
    for way in ways:
        assert f"│ {way} " in shown
    folder = tmp_path / "runs/sweep-gates-digits"
    assert main(["report", str(folder), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Ways of gating" in page
    for way in ways:
        assert f"{way}: " in page


def test_a_gating_that_is_not_known_and_an_option_that_is_swept_are_named(capsys):
    assert main(["sweep", "gates", "digits", "--gatings", "loud"]) == 2
    assert "there is no gating 'loud': choose among constant, batch" in capsys.readouterr().err
    assert main(["sweep", "gates", "digits", "--survival.gate", "subset"]) == 2
    assert "--survival.gate is swept: give --gatings instead" in capsys.readouterr().err
