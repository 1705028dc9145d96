import shutil
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import stochastic_depth
from stochastic_depth.cli import main
from stochastic_depth.errors import ConfigError
from stochastic_depth.train import Config, begin, fit, open_run, reopen
from stochastic_depth.train.runtime import machine, resolve_runtime, versions
from support.runs import edit_description, stop_after


def test_auto_takes_a_gpu_if_there_is_one():
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_runtime(Config()).device == kind


@pytest.mark.parametrize(
    ("processor", "precision"),
    [
        ({"avx512_bf16": True}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"avx512_f": True}, "float32"),
        ({}, "float32"),  # versions of PyTorch that cannot tell
    ],
)
def test_auto_takes_bfloat16_where_the_processor_has_it(processor, precision, monkeypatch):
    monkeypatch.setattr("stochastic_depth.train.runtime.cpu_capabilities", lambda: processor)
    assert resolve_runtime(Config(device="cpu")).precision == precision


def test_what_is_asked_for_is_taken():
    assert resolve_runtime(Config(device="cpu", precision="float32")).precision == "float32"
    assert resolve_runtime(Config(device="cpu", precision="bfloat16")).precision == "bfloat16"


def test_a_run_on_a_numbered_cpu_is_one_on_the_cpu(small, path, silent):
    run, images = begin(replace(small, device="cpu:0"), path)
    assert run.runtime.device == "cpu"
    records = fit(run, images, silent)
    next(records)
    records.close()
    assert len(list(fit(*reopen(path), silent))) == 4


@pytest.fixture
def elsewhere(finished, path):
    """A run that has ended on a device that is not here."""
    shutil.copytree(finished, path)
    edit_description(path, lambda described: described["runtime"].update(device="cuda:99"))
    return path


@pytest.mark.parametrize(
    "command",
    [
        "eval {run}",
        "train --resume {run}",
        "export {run} --out {folder}/out.safetensors",
        "analyze ensemble {run} --subnetworks 1",
        "analyze pruning {run} --points 2 --repeats 2 --batch 2 --recalibrate-on 32",
    ],
)
def test_a_run_of_a_device_that_is_not_here_goes_on_by_another_one(
    command, elsewhere, tmp_path, capsys
):
    arguments = command.format(run=elsewhere, folder=tmp_path).split()
    assert main(arguments) == 1
    assert "device is 'cuda:99', which cannot be used" in capsys.readouterr().err
    assert main([*arguments, "--device", "cpu"]) == 0


def test_a_run_of_any_device_classifies_pictures(elsewhere, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    assert main(["predict", str(elsewhere), str(tmp_path / "picture.png")]) == 0


def test_a_run_says_that_it_goes_on_by_another_device(elsewhere, silent, monkeypatch):
    said = []
    monkeypatch.setattr(silent, "say", said.append)
    list(fit(*reopen(elsewhere, device="cpu"), silent))
    assert [line for line in said if line.startswith("begun on cuda:99 by")]


def test_what_times_depend_on_is_recorded_where_a_resumption_changes_it(small, path, silent):
    """Also for the interval in the middle of which the change was, whoever ends it."""
    run, images = begin(small, path)
    threads = torch.get_num_threads()
    stop_after(small.evaluate_every + 1, run, images)
    torch.set_num_threads(threads + 1)
    stop_after(small.evaluate_every + 2, *reopen(path))
    torch.set_num_threads(threads)
    list(fit(*reopen(path), silent))
    first, second, third, *_ = run.records()
    assert second.elsewhere is not None
    assert second.elsewhere["threads"] == str(threads + 1)
    assert (first.elsewhere, third.elsewhere) == (None, None)


def test_a_run_from_before_processes_were_counted_is_resumed(small, path, silent):
    run, images = begin(small, path)
    stop_after(1, run, images)
    edit_description(path, lambda described: described["machine"].pop("processes"))
    assert all(record.elsewhere is None for record in fit(*reopen(path), silent))


def test_a_run_goes_on_by_another_device_in_the_precision_it_began_with(elsewhere):
    other = {"bfloat16": "float32", "float32": "bfloat16"}
    before = open_run(elsewhere).runtime.precision
    for precision in (before, other[before]):
        edit_description(elsewhere, lambda d, p=precision: d["runtime"].update(precision=p))
        run, images = reopen(elsewhere, device="cpu")
        assert (run.runtime.device, run.runtime.precision) == ("cpu", precision)
        assert images.mean.device.type == "cpu"


def test_the_device_of_a_run_given_again_changes_nothing(finished):
    assert reopen(finished, device=open_run(finished).runtime.device)[0] == reopen(finished)[0]


def test_several_processes_go_on_by_autograd_with_a_run_of_the_block_program(
    small, path, monkeypatch
):
    begin(replace(small, engine="program"), path)
    for module in ("engine_choice", "open"):
        monkeypatch.setattr(f"stochastic_depth.train.{module}.world_size", lambda: 2)
    assert reopen(path)[0].runtime.engine == "eager"


def test_a_device_that_fails_without_a_reason_is_named(monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(ConfigError, match=r"device is 'cpu', which cannot be used \(no reason giv"):
        resolve_runtime(Config(device="cpu"))


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta", "xla", "cpu:x", ""])
def test_a_device_that_cannot_train_is_named_with_those_that_can(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ConfigError, match=f"device is '{device}'.*choose from cpu, cuda:0, cuda:1$"
    ):
        resolve_runtime(Config(device=device))


def test_the_machine_is_described():
    described = machine(resolve_runtime(Config(device="cpu")))
    assert described["processor"]
    assert described["threads"] == torch.get_num_threads()


def test_the_versions_are_those_of_what_runs():
    shown = versions()
    assert shown == {
        "stochastic-depth": stochastic_depth.__version__,
        "torch": torch.__version__,
        "python": "{}.{}.{}".format(*sys.version_info),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a run on CUDA")
def test_a_gpu_trains(tmp_path):
    arguments = ["--model.depth", "20", "--epochs", "2", "--device", "cuda", "--quiet"]
    assert main(["train", "digits", *arguments, "--run", str(tmp_path / "run")]) == 0
