import json
import re
import shutil
from dataclasses import replace

import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.lab.recorded import read_run, read_sources
from stochastic_depth.lab.report import build_report
from stochastic_depth.lab.sweep.folder import read_sweep
from stochastic_depth.lab.sweep.progress import sweep_table
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig, begin, fit
from support.runs import SILENT


def test_runs_folders_of_them_sweeps_and_benchmarks_are_told_apart(
    compared, survival_sweep, benchmark_file
):
    sources = read_sources([compared, survival_sweep, benchmark_file])
    assert [run.name for run in sources.runs] == [
        "constant-seed0",
        "constant-seed1",
        "stochastic-seed0",
        "stochastic-seed1",
    ]
    (sweep,) = sources.sweeps
    assert len(sweep.runs) == sweep.size == 5
    assert len(sources.benchmarks) == 1
    assert not sources.under_way


def test_a_sweep_is_under_way_until_every_point_is_finished_or_failed(survival_sweep, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(survival_sweep, folder)
    assert not read_sources([folder]).under_way
    run = folder / "runs" / "uniform-0.5-depth14-seed0"
    (run / "model.safetensors").unlink()
    assert read_sources([folder]).under_way
    (run / "failed.txt").write_text("the loss is not finite at step 3")
    assert not read_sources([folder]).under_way
    shutil.rmtree(run)
    assert read_sources([folder]).under_way


def test_folders_that_are_of_no_point_are_named_and_not_counted(survival_sweep, tmp_path):
    """A backup would be a further seed, and a run of another length may be no better than noise."""
    folder = tmp_path / "sweep"
    shutil.copytree(survival_sweep, folder)
    runs = folder / "runs"
    shutil.copytree(runs / "linear-0.5-depth14-seed0", runs / "linear-0.5-depth14-seed0.backup")
    longer, images = begin(
        replace(RECIPES["digits"](), model=ModelConfig(depth=8), epochs=2), runs / "longer"
    )
    list(fit(longer, images, SILENT))
    (runs / "notes").mkdir()
    (runs / "plan.txt").write_text("five seeds")
    (sweep,) = read_sources([folder]).sweeps
    assert sweep.others == ("linear-0.5-depth14-seed0.backup", "longer", "notes")
    (section,) = build_report(read_sources([folder])).sections
    assert f"{folder}: 5 of 5 runs finished. Left out" in section.sentence
    assert section.sentence.endswith(": linear-0.5-depth14-seed0.backup, longer, notes.")
    (alone,) = build_report(read_sources([survival_sweep])).sections
    assert section.figures == alone.figures
    assert section.runs == alone.runs
    shutil.rmtree(runs / "uniform-0.5-depth14-seed0")
    (sweep,) = read_sources([folder]).sweeps
    assert sweep.under_way


def test_a_finished_run_that_has_lost_its_description_is_named_with_a_remedy(
    survival_sweep, compared, tmp_path
):
    shutil.copytree(survival_sweep, tmp_path / "sweep")
    shutil.copytree(compared, tmp_path / "compared")
    point = tmp_path / "sweep" / "runs" / "uniform-0.5-depth14-seed0"
    alone = tmp_path / "compared" / "constant-seed0"
    for run in (point, alone):
        (run / "config.json").unlink()
    for run, read in (
        (point, lambda: read_sources([tmp_path / "sweep"])),
        (point, lambda: sweep_table(read_sweep(tmp_path / "sweep"))),
        (alone, lambda: read_sources([tmp_path / "compared"])),
        (alone, lambda: read_run(alone)),
    ):
        with pytest.raises(RunError, match=f"{run} has lost its config.json: put a copy in its"):
            read()
    shutil.rmtree(point)
    (sweep,) = read_sources([tmp_path / "sweep"]).sweeps
    assert (len(sweep.runs), sweep.under_way) == (4, True)


def test_a_run_named_twice_counts_once(compared):
    assert len(read_sources([compared, compared / "constant-seed0"]).runs) == 4


def test_a_run_that_is_being_written_is_read_as_far_as_it_is(compared, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_bytes((compared / "constant-seed0" / "config.json").read_bytes())
    assert read_sources([run]).runs[0].records == ()
    journal = (compared / "constant-seed0" / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(journal[:-9])
    sources = read_sources([run])
    assert len(sources.runs[0].records) == 1
    assert sources.under_way


@pytest.mark.parametrize("lines", [0, 1, 1.5])
def test_a_finished_run_whose_journal_was_cut_is_refused(compared, tmp_path, lines):
    """Its numbers would be those of an earlier epoch."""
    shutil.copytree(compared / "constant-seed0", tmp_path / "run")
    journal = tmp_path / "run" / "metrics.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes((first * (lines >= 1)) + second[:99] * (lines == 1.5))
    shown = f"run is finished, and .*metrics.jsonl ends at epoch {int(lines)} of 2: lines are miss"
    with pytest.raises(RunError, match=shown):
        read_sources([tmp_path / "run"])
    (tmp_path / "run" / "model.safetensors").unlink()
    (run,) = read_sources([tmp_path / "run"]).runs
    assert (run.finished, len(run.records)) == (False, int(lines))


def test_a_finished_point_whose_journal_is_empty_is_named(survival_sweep, tmp_path):
    shutil.copytree(survival_sweep, tmp_path / "sweep")
    run = tmp_path / "sweep" / "runs" / "uniform-0.5-depth14-seed0"
    (run / "metrics.jsonl").write_bytes(b"")
    for read in (
        lambda: read_sources([tmp_path / "sweep"]),
        lambda: sweep_table(read_sweep(run.parents[1])),
    ):
        with pytest.raises(RunError, match=f"{run} is finished, and .* ends at epoch 0 of 1"):
            read()


def test_a_run_with_the_weights_of_another_one_is_refused(compared, tmp_path):
    shutil.copytree(compared / "constant-seed0", tmp_path / "run")
    foreign = compared / "constant-seed1" / "model.safetensors"
    shutil.copy(foreign, tmp_path / "run" / "model.safetensors")
    with pytest.raises(RunError, match=r"run/model.safetensors belongs to another run"):
        read_sources([tmp_path / "run"])


@pytest.mark.parametrize(
    ("name", "content", "shown"),
    [
        ("empty", None, "holds no run: give run folders"),
        ("foreign.json", "{}", "is not what bench depth writes: give run folders"),
        ("metrics.jsonl", "{}\n{}\n", r"is not a JSON file \(Extra data: .*\); give run folders"),
        ("list.json", "[]", "holds no object; give run folders"),
        ("sweep/sweep.json", '{"format": 2}', "has format 2, this version reads 1"),
        ("sweep/sweep.json", '{"format": 1}', "sweep.json is not of a sweep: KeyError"),
        ("sweep/sweep.json", '{"format": 1, "kind": "width"}', "there is no sweep of 'width'"),
    ],
)
def test_what_is_none_of_these_is_refused(name, content, shown, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(RunError, match=shown):
        read_sources([tmp_path / name.split("/")[0]])


def _edited(text: str) -> str:
    return text.replace('"error": 5.0', '"error": 0.5', 1)


def _without_checksum(text: str) -> str:
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"})


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda text: "{", "is not a JSON file"),
        (lambda text: "[]", "cannot be understood: it holds no object"),
        (lambda text: '{"format": 1}', "has no checksum"),
        (_without_checksum, "has no checksum"),
        (_edited, "is damaged or was edited"),
    ],
)
@pytest.mark.parametrize("name", ["ensemble", "pruning"])
def test_an_analysis_that_was_not_written_so_is_refused_with_the_remedy(
    name, damage, what, compared, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(compared / "stochastic-seed0", run)
    path = run / "analysis" / f"{name}.json"
    assert read_run(run).analysis(name)
    path.write_text(damage(path.read_text()))
    remedy = f"remove it, and measure again by stochastic-depth analyze {name} {run}"
    with pytest.raises(RunError, match=re.escape(f"{path} {what}")) as refused:
        read_run(run).analysis(name)
    assert str(refused.value).endswith(remedy)


def test_an_analysis_of_another_run_is_refused(compared, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(compared / "stochastic-seed0", run)
    shutil.copy(compared / "constant-seed0" / "analysis" / "pruning.json", run / "analysis")
    with pytest.raises(RunError, match=r"pruning.json is of another run"):
        read_run(run).analysis("pruning")


def test_an_analysis_of_another_format_is_refused(compared, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(compared / "stochastic-seed0", run)
    monkeypatch.setattr("stochastic_depth.lab.analyses.FORMAT", 7)
    with pytest.raises(RunError, match=r"ensemble.json has format 1, this version reads 7"):
        read_run(run).analysis("ensemble")
