"""Each row of the page "When a run has stopped": what it says is provoked, and its remedy works."""

import errno
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch._inductor.exc import CppCompileError

from stochastic_depth.block_program import library
from stochastic_depth.cli import main
from stochastic_depth.errors import Interrupted, RunError, StochasticDepthError
from stochastic_depth.train import Config, begin, fit, open_run, reopen, trained_model
from stochastic_depth.train.signals import StopSignals
from stochastic_depth.train.train_state import TrainState
from stochastic_depth.train.weights import read_weights, write_weights
from support.data_sets import write_imagenet
from support.runs import assert_same_end, edit_description

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "recover.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", PAGE, re.MULTILINE)[1:]
SMALL = (
    "digits --data.train 320 --optimizer.batch 32 --model.depth 14 --survival.final 0.3 "
    "--epochs 2 --evaluate-every 4 --quiet"
)
"""The fixture `small`, for the command line."""
SCENES = {}


def row(start):
    """What stands for the row that begins so."""
    return lambda scene: SCENES.setdefault(start, scene)


@dataclass
class Runs:
    """Makes runs in all states, and what they would have come to."""

    small: Config
    path: Path
    finished: Path
    watch: object
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture

    def stopped(self) -> Path:
        """A run of which two of five intervals are done."""
        run, images = begin(self.small, self.path)
        under_way = fit(run, images, self.watch)
        for _ in range(2):
            next(under_way)
        under_way.close()
        return self.path

    def ended(self) -> Path:
        return Path(shutil.copytree(self.finished, self.path))

    def backup(self) -> Path:
        return Path(shutil.copytree(self.path, self.path.with_name("backup")))

    def restore(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.path.with_name("backup"), self.path)

    def resume(self, path: Path | None = None) -> None:
        """By the command that the page begins with."""
        assert main(["train", "--resume", str(path or self.path), "--quiet"]) == 0

    def refused(self, path: Path | None = None) -> str:
        with pytest.raises(StochasticDepthError) as raised:
            list(fit(*reopen(path or self.path), self.watch))
        return str(raised.value)

    def weights_are_back(self) -> None:
        here, right = (
            read_weights(run / "model.safetensors") for run in (self.path, self.finished)
        )
        assert all(torch.equal(here[name], tensor) for name, tensor in right.items())

    def ends_as_if_nothing_had_happened(self, path: Path | None = None) -> None:
        assert_same_end(open_run(path or self.path), open_run(self.finished))


@pytest.fixture
def runs(small, path, finished, silent, monkeypatch, capsys):
    return Runs(small, path, finished, silent, monkeypatch, capsys)


@pytest.mark.parametrize("said", ROWS)
def test_what_a_row_says_comes_and_its_remedy_works(said, runs):
    (scene,) = [scene for start, scene in SCENES.items() if said.startswith(start)]
    scene(runs)


def test_no_scene_is_of_a_row_that_is_gone():
    assert all(any(said.startswith(start) for said in ROWS) for start in SCENES)


@row("`stopped at step N, in the middle of a step")
def _(runs):
    runs.stopped()
    advance = TrainState.advance
    runs.monkeypatch.setattr(TrainState, "advance", died)
    looks = iter([None, signal.SIGINT])  # received while the step fails
    with pytest.raises(Interrupted, match="run stopped at step 8, in the middle of a step: the wo"):
        list(fit(*reopen(runs.path), runs.watch, lambda: next(looks)))
    runs.monkeypatch.setattr(TrainState, "advance", advance)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`PyTorch's compiler has failed")
def _(runs):
    runs.stopped()
    advance = TrainState.advance

    def fails(*_):
        raise CppCompileError(["g++", "x.cpp"], "In file included from y:\ny.h:7: error: no z\n")

    runs.monkeypatch.setattr(TrainState, "advance", fails)
    assert "PyTorch's compiler has failed (y.h:7: error: no z): begin a run" in runs.refused()
    runs.monkeypatch.setattr(TrainState, "advance", advance)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`device is …, which cannot be used`")
def _(runs):
    runs.stopped()
    edit_description(runs.path, lambda described: described["runtime"].update(device="cuda:99"))
    refused = runs.refused()
    assert refused.startswith("device is 'cuda:99', which cannot be used (")
    assert main([*shlex.split(refused.partition("stochastic-depth ")[2]), "--quiet"]) == 0
    runs.weights_are_back()


@row("`native kernels: no C++ compiler was found`, `… failed`")
def _(runs):
    if library.why_unavailable() is not None:
        pytest.skip(f"needs native kernels: {library.why_unavailable()}")
    begin(replace(runs.small, engine="program"), runs.path)
    fails = runs.path.with_name("fails")
    fails.write_text("#!/bin/sh\nexit 1\n")
    fails.chmod(0o700)
    runs.monkeypatch.setenv("XDG_CACHE_HOME", str(runs.path.with_name("cache")))
    for compiler, shown in (("no-such", "no C++ compiler was found"), (fails, "fails failed")):
        library.library.cache_clear()
        runs.monkeypatch.setenv("CXX", str(compiler))
        refused = runs.refused()
        assert refused.startswith("native kernels: ")
        assert shown in refused
        assert "begin a run with --engine eager; or " in refused
        eager = f"train {SMALL} --engine eager --run {runs.path}-{fails == compiler}"
        assert main(shlex.split(eager)) == 0
    runs.monkeypatch.undo()
    runs.resume()


@row("`stopped at step N, with a checkpoint`")
def _(runs):
    looks = iter([None] * 12)
    runs.monkeypatch.setattr(StopSignals, "__call__", lambda self: next(looks, 2))
    command = f"train {SMALL} --run {runs.path}".replace(" --quiet", "")
    assert main(shlex.split(command)) == 130
    runs.monkeypatch.undo()
    shown = " ".join(runs.capsys.readouterr().out.split())
    assert re.search(r"stopped at step \d+, with a checkpoint", shown)
    (printed,) = re.findall(r"resume: stochastic-depth (.+)", shown)
    assert main(shlex.split(printed)) == 0
    runs.ends_as_if_nothing_had_happened()


@row("nothing: it was killed")
def _(runs):
    run, images = begin(runs.small, runs.path)
    under_way = fit(run, images, runs.watch)
    next(under_way)
    killed = runs.backup()  # as the folder is while it is written
    (killed / "checkpoints" / ".unfinished-1").write_bytes(b"half")
    with (killed / "metrics.jsonl").open("ab") as journal:
        journal.write(b'{"step": 8, "ep')
    runs.resume(killed)
    runs.ends_as_if_nothing_had_happened(killed)


@row("`No space left on device")
def _(runs):
    path, fsync = runs.stopped(), os.fsync

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runs.monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device; make room, then resume the run" in runs.refused()
    runs.monkeypatch.setattr(os, "fsync", fsync)
    runs.resume(path)
    runs.ends_as_if_nothing_had_happened()


@row("`cannot be written: Read-only file system`")
def _(runs):
    def read_only(folder, *args, **options):
        if Path(folder).is_relative_to(runs.path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    runs.stopped()
    runs.monkeypatch.setattr("stochastic_depth.train.run_folder.remove_unfinished", read_only)
    assert "cannot be written: Read-only file system" in runs.refused()
    copy = runs.backup()
    runs.resume(copy)
    runs.ends_as_if_nothing_had_happened(copy)


@row("`is being written by another process`")
def _(runs):
    under_way = fit(*reopen(runs.stopped()), runs.watch)
    next(under_way)
    assert "is being written by another process" in runs.refused()
    under_way.close()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`was removed or replaced while it was being written`")
def _(runs):
    run, images = begin(runs.small, runs.path)
    under_way = fit(run, images, runs.watch)
    next(under_way)
    runs.backup()
    shutil.rmtree(runs.path)
    with pytest.raises(StochasticDepthError, match="was removed or replaced while it was being"):
        list(under_way)
    assert main(shlex.split(f"train {SMALL} --run {runs.path}")) == 0  # begun anew
    runs.ends_as_if_nothing_had_happened()
    runs.restore()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`step-….ckpt is damaged")
def _(runs):
    newest = max((runs.stopped() / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    list(fit(*reopen(runs.path), runs.watch))
    assert f"{newest.name} is damaged" in runs.watch.said[0]
    assert runs.watch.said[0].endswith("; using the one before it")
    runs.ends_as_if_nothing_had_happened()


@row("`step-….ckpt belongs to another run`")
def _(runs):
    folder = runs.stopped() / "checkpoints"
    first = min(folder.iterdir())
    other, _ = begin(replace(runs.small, seed=1), runs.path.with_name("other"))
    under_way = fit(*reopen(other.path), runs.watch)
    next(under_way)
    under_way.close()
    shutil.copy(other.checkpoints.path(4), folder / "step-000000012.ckpt")
    shutil.copy(first, folder / "step-000000016.ckpt")
    runs.backup()
    list(fit(*reopen(runs.path), runs.watch))
    shown = " ".join(runs.watch.said)
    assert "step-000000012.ckpt belongs to another run" in shown
    assert "step-000000016.ckpt belongs to step 4: it was renamed" in shown
    runs.ends_as_if_nothing_had_happened()
    runs.restore()
    (folder / "step-000000012.ckpt").unlink()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`is finished and has no checkpoints left`")
def _(runs):
    shutil.rmtree(runs.ended() / "checkpoints")
    assert "is finished and has no checkpoints left" in runs.refused()
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (runs.path / name).read_bytes() == (runs.finished / name).read_bytes()
    assert main(["eval", str(runs.path), "--checkpoint", "last"]) == 0
    out = str(runs.path.with_name("exported.safetensors"))
    assert main(["export", str(runs.path), "--checkpoint", "last", "--out", out]) == 0


@row("`no checkpoint can be trusted`")
def _(runs):
    runs.ended()
    runs.backup()

    def damage():
        for checkpoint in (runs.path / "checkpoints").iterdir():
            checkpoint.write_bytes(b"damaged")

    damage()
    refused, journal = runs.refused(), runs.path / "metrics.jsonl"
    assert "no checkpoint can be trusted" in refused
    assert f"delete it and {journal}, and resume: the run begins at step 0" in refused
    shutil.copytree(
        runs.path.with_name("backup") / "checkpoints", runs.path / "checkpoints", dirs_exist_ok=True
    )
    runs.resume()
    runs.ends_as_if_nothing_had_happened()
    damage()
    shutil.rmtree(runs.path / "checkpoints")
    journal.unlink()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`lines are missing`")
def _(runs):
    journal = runs.stopped() / "metrics.jsonl"
    runs.backup()
    whole = journal.read_bytes()
    journal.write_bytes(whole.splitlines(keepends=True)[0])
    refused = runs.refused()
    assert "lines are missing" in refused
    assert "or delete the checkpoints of steps after 4, and resume" in refused
    max((runs.path / "checkpoints").iterdir()).unlink()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()
    journal.write_bytes(whole.splitlines(keepends=True)[0])
    with pytest.raises(RunError, match=r"is finished, and .* ends at epoch .* lines are missing"):
        trained_model(*reopen(runs.path))
    runs.restore()
    journal.write_bytes(b"")
    assert "lines are missing" in runs.refused()
    journal.write_bytes(whole)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`metrics.jsonl, line N is not a record as this run wrote it`")
def _(runs):
    journal = runs.stopped() / "metrics.jsonl"
    whole = journal.read_bytes()
    changed = whole.replace(b"\n", b"\r\n")
    journal.write_bytes(changed)
    assert "metrics.jsonl, line 1 is not a record as this run wrote it" in runs.refused()
    assert journal.read_bytes() == changed
    journal.write_bytes(whole)
    runs.backup()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()
    runs.restore()
    shutil.rmtree(runs.path / "checkpoints")
    journal.unlink()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`has N records and no checkpoints`")
def _(runs):
    checkpoints = runs.stopped() / "checkpoints"
    runs.backup()
    journal = (runs.path / "metrics.jsonl").read_bytes()
    shutil.rmtree(checkpoints)
    assert "has 2 records and no checkpoints; nothing was changed" in runs.refused()
    assert (runs.path / "metrics.jsonl").read_bytes() == journal
    shutil.copytree(runs.path.with_name("backup") / "checkpoints", checkpoints)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`was written by another version of this library`")
def _(runs):
    edit_description(runs.stopped(), lambda described: described.update(format=1))
    assert (
        "run was written by another version of this library: the format in its " in runs.refused()
    )


@row("`config.json is damaged or was edited`")
def _(runs):
    config = runs.stopped() / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"epochs": 2', '"epochs": 3'))
    assert "config.json is damaged or was edited" in runs.refused()
    config.write_text(original)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`has lost its config.json`")
def _(runs):
    config = runs.stopped() / "config.json"
    original = config.read_bytes()
    config.unlink()
    assert "run has lost its config.json: put a copy in its place; or remove" in runs.refused()
    assert main(["train", "--resume", str(runs.path)]) == 1
    assert "run has lost its config.json: put a copy in its" in runs.capsys.readouterr().err
    config.write_bytes(original)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`model.safetensors belongs to another run`")
def _(runs):
    weights = runs.ended() / "model.safetensors"
    write_weights(weights, {"weight": torch.ones(1)}, {"run": "f" * 32, "recipe": "digits"})
    run, images = reopen(runs.path)
    shown = rf"safetensors belongs to another run \({'f' * 32}, not {run.id}\): remove it"
    for use in (lambda: trained_model(run, images), lambda: read_weights(weights, run.id)):
        with pytest.raises(StochasticDepthError, match=shown):
            use()
    weights.unlink()
    runs.resume()
    runs.weights_are_back()
    runs.ends_as_if_nothing_had_happened()


@row("`it is a link`")
def _(runs):
    runs.stopped()
    elsewhere = runs.path.with_name("elsewhere")
    for name, shown in (
        ("metrics.jsonl", "a link"),
        ("lock", "a pipe"),
        ("config.json", "a device"),
    ):
        file = runs.path / name
        shutil.copyfile(file, elsewhere)
        file.unlink()
        match shown:
            case "a link":
                file.symlink_to(elsewhere)
            case "a pipe":
                os.mkfifo(file)
            case "a device":
                os.mknod(file, 0o20600, os.makedev(1, 3))
        assert f"it is {shown}" in runs.refused()
        file.unlink()
        if name != "lock":  # that one is made when it is missing
            shutil.copyfile(elsewhere, file)
    os.link(runs.path / "metrics.jsonl", elsewhere.with_name("second name"))
    assert "it is a hard link" in runs.refused()
    content = (runs.path / "metrics.jsonl").read_bytes()
    (runs.path / "metrics.jsonl").unlink()
    (runs.path / "metrics.jsonl").write_bytes(content)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


@row("`model.safetensors is damaged")
def _(runs):
    weights = runs.ended() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert list(fit(*reopen(runs.path), runs.watch)) == []
    assert re.search(r"safetensors is not a complete .* file.*; written again", runs.watch.said[-1])
    runs.weights_are_back()
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    assert list(fit(*reopen(runs.path), runs.watch)) == []
    assert re.search(r"model.safetensors is damaged.*; written again", runs.watch.said[-1])
    runs.weights_are_back()


@row("`began on data with fingerprint")
def _(runs):
    pictures = runs.path.with_name("pictures")
    write_imagenet(pictures, train=2, val=1)
    right = Path(shutil.copytree(pictures, runs.path.with_name("right")))
    assert main(shlex.split(f"train {PICTURES} --data.root {pictures} --run {runs.path}")) == 0
    changed = next((pictures / "train").rglob("*.JPEG"))
    changed.write_bytes(changed.read_bytes() + b"\0")
    max((runs.path / "checkpoints").iterdir()).unlink()
    assert re.search(r"data with fingerprint \w{12}, this data has \w{12}:", runs.refused())
    assert main(["train", "--resume", str(runs.path), "--data", str(right), "--quiet"]) == 0


PICTURES = (
    "imagenet-resnet50 --data.size 32 --data.workers 0 --model.kind cifar-resnet --model.depth 8 "
    "--optimizer.batch 2 --epochs 1 --evaluate-every 1 --quiet"
)


@row("`not finite at step N`")
def _(runs):
    digits = f"train digits --model.depth 8 --epochs 1 --quiet --run {runs.path}"
    assert main(shlex.split(f"{digits} --optimizer.learning-rate 1e30")) == 1
    assert "not finite at step" in runs.capsys.readouterr().err
    for number, remedy in enumerate(
        (
            "--optimizer.learning-rate 0.05",
            "--optimizer.learning-rate 0.05 --optimizer.warmup-epochs 0.5",
            "--schedule warmup",
        )
    ):
        assert main(shlex.split(f"{digits}-{number} {remedy}")) == 0


@row("`out of memory at step N (blocks")
def _(runs):
    runs.stopped()
    advance = TrainState.advance

    def exhausted(self, *batch):
        if self.step == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return advance(self, *batch)

    runs.monkeypatch.setattr(TrainState, "advance", exhausted)
    assert re.match(r"out of memory at step 9 of \S+ \(blocks .* open\)", runs.refused())
    runs.monkeypatch.setattr(TrainState, "advance", advance)
    measuring = sys.modules["stochastic_depth.train.fit"]
    runs.monkeypatch.setattr(measuring, "evaluate_parts", exhausted_evaluation)
    assert re.match(r"out of memory at step \d+ of \S+ \(in evaluation\)", runs.refused())
    runs.monkeypatch.undo()
    runs.resume()
    runs.ends_as_if_nothing_had_happened()
    for number, remedy in enumerate(("--optimizer.batch 64", "--precision bfloat16")):
        other = f"train digits --model.depth 8 --epochs 1 --quiet --run {runs.path}-{number}"
        assert main(shlex.split(f"{other} {remedy}")) == 0


@row("`a process that decodes pictures has died`")
def _(runs):
    runs.stopped()
    advance = TrainState.advance
    # How it comes about, with processes, is tested with the failures; here, that the run goes on.
    runs.monkeypatch.setattr(TrainState, "advance", died)
    assert "a process that decodes pictures has died" in runs.refused()
    runs.monkeypatch.setattr(TrainState, "advance", advance)
    runs.resume()
    runs.ends_as_if_nothing_had_happened()


def exhausted_evaluation(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


def died(*_):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
