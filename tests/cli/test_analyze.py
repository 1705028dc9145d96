"""stochastic-depth analyze, on run folders as train and compare write them."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from stochastic_depth.cli import main
from stochastic_depth.errors import RunError
from support.runs import edit_description

SMALL = ["--model.depth", "8", "--epochs", "2", "--quiet"]
QUICK = ["--points", "3", "--choose-on", "20", "--recalibrate-on", "100", "--repeats", "2"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """constant-seed0, constant-seed1, stochastic-seed0, stochastic-seed1."""
    folder = tmp_path_factory.mktemp("analyze")
    assert main(["compare", "digits", *SMALL, "--seeds", "2", "--out", str(folder)]) == 0
    return folder


def shown(capsys, *arguments):
    code = main(["analyze", *map(str, arguments)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert max(len(line) for line in captured.out.splitlines() if "/" not in line) <= 80
    return captured.out


def refused(capsys, *arguments):
    assert main(["analyze", *map(str, arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def kinds(runs, kind):
    return sorted(runs.glob(f"{kind}-seed*"))


@pytest.mark.parametrize("question", ["gradients", "active", "ensemble", "pruning"])
def test_every_question_has_help_and_needs_a_run(question, capsys):
    assert main(["analyze", question, "--help"]) == 0
    assert "RUN..." in capsys.readouterr().out
    assert main(["analyze", question]) == 2


WITHOUT_ALTAIR = """
import sys
sys.modules["altair"] = None
from stochastic_depth.cli import main
run, *quick = sys.argv[1:]
ensemble = ["ensemble", run, "--subnetworks", "1"]
for question in (["gradients", run], ["active", run], ensemble, ["pruning", run, *quick]):
    assert main(["analyze", *question]) == 0, question
"""


def test_no_question_needs_the_library_of_charts(runs, tmp_path):
    shutil.copytree(kinds(runs, "stochastic")[0], tmp_path / "run")
    command = [sys.executable, "-c", WITHOUT_ALTAIR, str(tmp_path / "run"), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gradients_are_shown_by_kind_epoch_and_block(runs, capsys):
    out = shown(capsys, "gradients", *kinds(runs, "*"), "--epochs", 2, "--blocks", 2)
    assert "constant" in out
    assert "stochastic" in out
    assert "ratio" in out
    rows = [line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")]
    assert rows == ["2", "1", "3", "1", "3"]  # one epoch; then two of three blocks, twice
    for epoch in ("3", "1.5", "0", "nan"):
        error = refused(capsys, "gradients", runs / "constant-seed0", "--epochs", epoch)
        assert f"has no epoch {epoch} in its journal: choose --epochs from 1, 2\n" in error


@pytest.mark.parametrize(
    "wrong",
    [
        "gradients --blocks 1",
        "ensemble --subnetworks 0",
        "pruning --points 1",
        "pruning --points -3",
        "pruning --choose-on 0",
        "pruning --recalibrate-on 1",
        "pruning --batch -1",
        "pruning --repeats 1",
    ],
)
def test_a_number_that_is_too_small_is_refused_before_anything_is_measured(
    wrong, runs, capsys, tmp_path
):
    unmeasured = shutil.ignore_patterns("analysis")
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "run", ignore=unmeasured)
    question, option, number = wrong.split()
    assert main(["analyze", question, "run", option, number]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {option} is {number}: it must be at least ")
    assert captured.out == ""
    assert not (tmp_path / "run" / "analysis").exists()


def test_a_title_that_is_wider_than_its_table_is_not_broken(runs, capsys):
    lines = shown(capsys, "gradients", runs / "constant-seed0", "--epochs", 2).splitlines()
    assert lines[0] == "Mean absolute gradient at the first convolution"
    assert lines[1] == "mean over the steps since the evaluation before"
    assert lines[2].startswith("┏")


def test_journals_are_enough_for_gradients_and_active_blocks(runs, capsys, tmp_path):
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "model.safetensors").unlink()
    shown(capsys, "gradients", "run")
    out = shown(capsys, "active", "run")
    assert "exact 2.00" in out
    assert "has no checkpoints left" in refused(capsys, "ensemble", "run")


def test_the_ensemble_of_several_seeds_is_one_table(runs, capsys):
    out = shown(capsys, "ensemble", *kinds(runs, "stochastic"), "--subnetworks", 4)
    assert "mean ± deviation, 2 runs" in out
    assert "mean of 4 sampled networks" in out
    for run in kinds(runs, "stochastic"):
        assert str(run / "analysis" / "ensemble.json") in out
        content = json.loads((run / "analysis" / "ensemble.json").read_text())
        assert content["subnetworks"] == 4


def test_constant_depth_is_refused_before_anything_is_measured(runs, capsys, tmp_path):
    unmeasured = shutil.ignore_patterns("analysis")
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "run", ignore=unmeasured)
    error = refused(capsys, "ensemble", "run", runs / "constant-seed0")
    assert "constant-seed0 has constant depth" in error
    assert not (tmp_path / "run" / "analysis" / "ensemble.json").exists()


def test_pruning_of_one_run_tells_parameters_and_time(runs, capsys):
    run = runs / "constant-seed0"
    out = shown(capsys, "pruning", run, *QUICK)
    assert "parameters" in out
    assert "ms an" in out
    assert "without the least needed blocks" in out
    assert "constant-seed0: choosing" in out
    assert "choosing" not in shown(capsys, "pruning", run, *QUICK)
    assert "choosing" in shown(capsys, "pruning", run, *QUICK, "--again")
    assert "choosing" in shown(capsys, "pruning", run, *QUICK, "--batch", 7)


@pytest.mark.parametrize("question", [["ensemble", "--subnetworks", 2], ["pruning", *QUICK]])
def test_a_result_that_cannot_be_kept_is_shown_and_that_is_said_first(
    question, runs, capsys, tmp_path
):
    name, *options = question
    unmeasured = shutil.ignore_patterns("analysis")
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "run", ignore=unmeasured)
    (tmp_path / "run" / "analysis").write_text("no folder")
    out = shown(capsys, name, "run", *options)
    note = "the result is shown, and not kept, because run/analysis cannot be made"
    assert out.startswith(note)
    assert "┏" in out
    assert (tmp_path / "run" / "analysis").read_text() == "no folder"


def test_a_result_that_does_not_fit_on_the_disk_is_shown(runs, capsys, tmp_path, monkeypatch):
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "run")

    def full(*args, **options):
        raise RunError("run/analysis/ensemble.json could not be written: No space left on device")

    monkeypatch.setattr("stochastic_depth.lab.analyses.write_whole", full)
    out = shown(capsys, "ensemble", "run", "--subnetworks", 2, "--again")
    assert "the result is shown, and not kept, because run/analysis/ensemble.json could not" in out
    assert "one sampled network" in out


def test_pruning_of_two_kinds_is_side_by_side(runs, capsys):
    out = shown(capsys, "pruning", *kinds(runs, "*"), *QUICK)
    assert "parameters" not in out
    assert out.count("±") > 20


def test_a_run_that_has_measured_nothing_is_told_with_what_to_do(runs, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(runs / "stochastic-seed0" / "config.json", tmp_path / "run")
    error = refused(capsys, "gradients", runs / "constant-seed0", "run")
    assert "run has measured nothing yet, its journal is empty: resume it by " in error
    assert error.endswith("train --resume run\n")
    (tmp_path / "run" / "failed.txt").write_text("the loss is not finite at step 3\n")
    for question in ("active", "ensemble"):
        error = refused(capsys, question, "run")
        assert "run has measured nothing, it failed: the loss is not finite at step 3." in error
        assert error.endswith("Leave this run out\n")
    assert main(["eval", "run"]) == 1
    error = capsys.readouterr().err
    assert "run has no evaluated checkpoint, it failed: the loss is not finite at step 3" in error


def test_runs_of_different_networks_are_told_apart(runs, capsys):
    main(["train", "digits", *SMALL, "--model.depth", "14", "--run", "deeper"])
    out = shown(capsys, "gradients", *kinds(runs, "*"), "deeper")
    shallow, deep = (out.index(f"ResNet-{depth} on digits, 2 epochs") for depth in (8, 14))
    assert shallow < out.index("constant depth") < deep < out.rindex("stochastic depth")


def test_a_run_and_its_copy_are_not_two_seeds(runs, capsys, tmp_path):
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "copy")
    error = refused(capsys, "gradients", runs / "stochastic-seed0", "copy", runs / "constant-seed0")
    assert re.search("(copy and .*-seed0|-seed0 and copy) have the same configuration", error)


def test_names_are_data(runs, capsys, tmp_path):
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "[red]x")
    assert "[red]x" in shown(capsys, "active", "[red]x")
    assert "[red]x" in shown(capsys, "ensemble", "[red]x", "--subnetworks", 1)


def test_data_that_is_not_there_is_named(runs, capsys, tmp_path):
    shutil.copytree(runs / "stochastic-seed0", tmp_path / "run")
    edit_description(
        tmp_path / "run",
        lambda described: described["config"]["data"].update(name="cifar10", root="/nowhere"),
    )
    assert "/nowhere" in refused(capsys, "pruning", "run", *QUICK)
    assert "elsewhere" in refused(capsys, "pruning", "run", *QUICK, "--data", "elsewhere")
    assert "not a run folder" in refused(capsys, "pruning", "nothing", *QUICK)
