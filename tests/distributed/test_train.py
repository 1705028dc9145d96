"""train by several processes: as one process trains, whoever dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from stochastic_depth.train import begin, fit, open_run, reopen
from stochastic_depth.train.display import RunView
from support.data_sets import write_imagenet
from support.forked import torchrun
from support.processes import environment, forked, program
from support.runs import assert_same_end

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(900)]

OPTIONS = "--model.depth 14 --survival.final 0.3 --epochs 2 --evaluate-every 4".split()
SYNCED = ["--distributed.sync-batchnorm"]
TIMEOUT = 400


def by_torchrun(*arguments: object) -> str:
    """`torchrun -m stochastic_depth train ...`, as users start two processes."""
    command = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    command += [program("command_line"), "--", "train", *arguments]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**environment(), "COLUMNS": "80"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@dataclass(frozen=True)
class Group:
    """The same by torchrun's own agent, whose processes need not import all anew."""

    agent: BaseProcess
    output: Path

    def finish(self) -> str:
        self.agent.join(TIMEOUT)
        self.agent.kill()
        assert self.agent.exitcode == 0, self.output.read_text()
        return self.output.read_text()


@pytest.fixture
def group(tmp_path) -> Callable[..., Group]:
    """`group(*arguments)`: a group under way."""

    def start(*arguments: object, restarts: int = 0) -> Group:
        output = tmp_path / "output.txt"
        return Group(forked(torchrun, restarts, "train", *arguments, output=output), output)

    return start


def journal(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def assert_close(path: Path, other: Path, tolerance: float = 2e-3) -> None:
    """Sums in another order are rounded differently, so that runs drift apart, slowly."""
    mine, others = journal(path), journal(other)
    assert len(mine) == len(others) == 5
    for record, expected in zip(mine, others, strict=True):
        for name in ("step", "active_blocks", "learning_rate"):
            assert record[name] == expected[name], name
        for name in ("train_loss", "test_loss", "validation_loss"):
            assert record[name] == pytest.approx(expected[name], rel=tolerance), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run of one process."""
    from stochastic_depth.cli import main

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["train", "digits", *OPTIONS, *SYNCED, "--quiet", "--run", f"{folder}/alone"]) == 0
    torch.set_num_threads(threads)
    return folder / "alone"


@pytest.fixture(scope="module")
def together(folder: Path) -> tuple[Path, str]:
    """The run of two processes, and what was printed."""
    run = folder / "together"
    return run, by_torchrun("digits", *OPTIONS, *SYNCED, "--run", run)


def test_two_processes_train_as_one_does(alone, together):
    run, _ = together
    assert_close(run, alone)


def test_one_process_prints_and_writes(together):
    run, output = together
    assert output.count("→") == output.count("epoch 2/2") == 1
    assert "engine eager: the block program supports one process, 2 are training" in output
    assert (run / "model.safetensors").exists()


def test_a_run_of_two_is_gone_on_with_by_one(together, alone, folder):
    begun, _ = together
    path = folder / "by-one"
    shutil.copytree(begun, path)
    (path / "model.safetensors").unlink()
    run = open_run(path)
    newest, *_ = run.checkpoints.steps()
    run.checkpoints.path(newest).unlink()
    (record,) = fit(*reopen(path), RunView("", print))
    assert (run.machine["processes"], record.elsewhere["processes"]) == (2, "1")
    assert run.records()[-1] == record
    assert_close(path, alone)


def test_a_run_of_one_is_gone_on_with_by_two(alone, folder, group):
    run, images = begin(open_run(alone).config, folder / "by-two")
    records = fit(run, images, RunView("", print))
    for _ in range(2):
        next(records)
    records.close()
    output = group("--resume", run.path).finish()
    assert "resuming at step 8 of 20" in output
    assert "the number of processes was 1, and is 2: results depend on it" in output
    elsewhere = [record.elsewhere for record in run.records()]
    assert elsewhere[:2] == [None, None]
    assert {conditions["processes"] for conditions in elsewhere[2:]} == {"2"}
    assert_close(run.path, alone)


def test_a_process_is_killed_and_the_group_ends_where_it_would_have(together, folder, group):
    """Bit for bit; what happens to more of them is in tests/train/test_kill.py."""
    (undisturbed, _), killed = together, folder / "killed"
    under_way = group("digits", *OPTIONS, *SYNCED, "--run", killed, restarts=2)
    began = time.monotonic()
    while not list((killed / "checkpoints").glob("step-*")):
        assert time.monotonic() < began + TIMEOUT
        time.sleep(0.01)
    os.kill(workers(under_way.agent.pid)[1], signal.SIGKILL)
    output = under_way.finish()
    assert "resuming at step" in output
    shown = [line for line in output.splitlines() if "torch/distributed/elastic" not in line]
    assert not any("Traceback" in line for line in shown)  # the agent logs how its process ended
    assert_same_end(open_run(undisturbed), open_run(killed))
    assert not list(killed.rglob(".unfinished-*"))


def test_a_tree_of_pictures_is_trained_on(folder, group):
    """The ImageNet recipe with fewer layers: a checkpoint of all of its 152 is half a gigabyte."""
    pytest.importorskip("torchvision", reason="needs torchvision")
    write_imagenet(folder / "pictures", train=8, val=3)
    options = "--model.depth 50 --data.size 32 --data.workers 1 --optimizer.batch 8 --epochs 1"
    options += f" --data.root {folder / 'pictures'} --precision float32"
    group("imagenet-resnet152", *options.split(), "--run", folder / "imagenet").finish()
    (record,) = journal(folder / "imagenet")
    assert record["step"] == 3  # of 8 images each, of 24
    assert record["test_error"] in [pytest.approx(100 * wrong / 9) for wrong in range(10)]


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started, in order of rank."""
    children = Path(f"/proc/{agent}/task").glob("*/children")
    return sorted(int(pid) for found in children for pid in found.read_text().split())


def test_what_may_be_restarted_must_say_where_it_writes(monkeypatch, capsys):
    from stochastic_depth.cli import main

    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["train", "digits", *OPTIONS]) == 1
    assert "--run DIR" in capsys.readouterr().err


def test_a_restart_does_not_go_on_with_a_run_of_another_configuration(alone, monkeypatch, capsys):
    from stochastic_depth.cli import main

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", "digits", "--run", str(alone)]) == 1
    assert "of another configuration" in capsys.readouterr().err
