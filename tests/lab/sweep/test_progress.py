import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.lab.outcomes import Outcome, Spread
from stochastic_depth.lab.sweep import progress as progress_module
from stochastic_depth.lab.sweep.folder import Sweep, open_sweep
from stochastic_depth.lab.sweep.grid import Grid
from stochastic_depth.lab.sweep.progress import SweepProgress, sweep_table
from stochastic_depth.lab.sweep.workers import train_point
from stochastic_depth.recipes.paper import gatings
from support.small_sweep import GRID, SMALL


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three points: one done, one failed, one begun by nobody."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    sweep = open_sweep(folder, "survival", replace(GRID, seeds=(0,)), SMALL)
    done, failed, _ = sweep.grid.points()
    train_point(sweep, done, lambda: None)
    sweep.path(failed).mkdir()
    sweep.fail(failed, "the loss is [red]not[/red] finite")
    return sweep


@pytest.fixture
def begun(tmp_path):
    return open_sweep(tmp_path / "sweep", "survival", replace(GRID, seeds=(0,)), SMALL)


def test_a_pipe_gets_a_line_for_each_run_that_ends(begun):
    console = Console(file=io.StringIO())
    with SweepProgress(begun, console) as progress:
        first, second, third = begun.grid.points()
        progress.look([first])
        assert console.file.getvalue() == ""
        train_point(begun, first, lambda: None)
        progress.look([second, third])
    (line,) = console.file.getvalue().splitlines()
    pattern = r"1/3 done, 2 running, 0 failed, left 0:0\d:\d\d  linear-0.3-depth8-seed0 test "
    assert re.match(pattern + r"\d+\.\d\d% in \d+\.\d s$", line)


def test_a_journal_is_read_only_when_it_has_grown_and_a_failure_once(begun, monkeypatch):
    first, second, third = begun.grid.points()
    train_point(begun, first, lambda: None)
    (begun.path(first) / "model.safetensors").unlink()
    begun.path(third).mkdir()
    begun.fail(third, "why")
    read = []
    for name in ("records", "failure"):
        method = getattr(type(begun), name)

        def counted(self, point, name=name, method=method):
            read.append((name, point))
            return method(self, point)

        monkeypatch.setattr(type(begun), name, counted)
    progress = SweepProgress(begun, Console(file=io.StringIO()))
    for _ in range(3):
        progress.look([first, second])
        progress.render()
    assert read.count(("records", first)) == 1
    assert progress._shares[first] == 1
    assert ("records", second) not in read
    before = read.count(("failure", third))
    progress.counts()
    assert read.count(("failure", third)) == before
    with open(begun.path(first) / "metrics.jsonl", "ab") as journal:
        journal.write(b'{"ste')  # the next line begins
    progress.look([first])
    assert read.count(("records", first)) == 2


def test_what_an_interrupted_sweep_has_trained_is_not_work_of_the_resumed_one(begun):
    first, *_ = begun.grid.points()
    train_point(begun, first, lambda: None)
    (begun.path(first) / "model.safetensors").unlink()  # all of its epochs, but not its weights
    progress = SweepProgress(begun, Console(file=io.StringIO()))
    progress.look([first])
    assert progress.counts() == "0/3 done, 1 running, 0 failed, left -:--:--"


def test_a_run_that_has_ended_is_not_running_while_its_worker_still_has_it(sweep):
    progress = SweepProgress(sweep, Console(file=io.StringIO()))
    progress.look(sweep.grid.points())
    assert progress.counts() == "1/3 done, 1 running, 1 failed, left -:--:--"


def test_what_had_ended_before_is_counted_and_not_told_again(sweep):
    console = Console(file=io.StringIO())
    with SweepProgress(sweep, console) as progress:
        progress.look([])
        assert progress.counts() == "1/3 done, 0 running, 1 failed, left -:--:--"
    assert console.file.getvalue() == ""


def test_quiet_shows_nothing(begun):
    console = Console(file=io.StringIO(), force_terminal=True)
    with SweepProgress(begun, console, quiet=True) as progress:
        point = begun.grid.points()[0]
        begun.path(point).mkdir()
        begun.fail(point, "why")
        progress.look([])
    assert console.file.getvalue() == ""


def test_a_terminal_gets_a_bar_for_each_run_in_80_columns(sweep):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    pages = Console(width=80, file=io.StringIO())
    with SweepProgress(sweep, console) as progress:
        progress.look(sweep.grid.points()[2:])
        pages.print(progress.render())
    assert "\x1b" in console.file.getvalue()
    head, run = pages.file.getvalue().splitlines()
    assert "1/3 done, 1 running, 1 failed" in head
    assert run.startswith("constant-depth8-seed0 ")
    assert max(len(head), len(run)) <= 80


def test_the_table_has_a_row_for_each_setting_and_blanks_where_none_is_done(sweep):
    pages = Console(width=80, file=io.StringIO())
    pages.print(sweep_table(sweep))
    lines = [line for line in pages.file.getvalue().splitlines() if line.startswith("│")]
    first, second, third = ([cell.strip() for cell in line.split("│")[1:-1]] for line in lines)
    records = sweep.records(sweep.grid.points()[0])
    best = min(records, key=lambda record: record.validation_error)
    assert first[:4] == ["linear", "0.3", "1", f"{best.test_error:.2f} %"]
    assert float(first[4]) == pytest.approx(sum(r.seconds for r in records), abs=0.01)
    assert second == ["linear", "0.6", "0 of 1", "", "", ""]
    assert third[:3] == ["constant", "", "0 of 1"]
    assert "cifar-resnet, depth 8, 2 epochs" in pages.file.getvalue()


def test_the_table_of_long_runs_of_every_gating_fits_80_columns(begun, monkeypatch):
    grid = Grid(("linear",), (0.5,), (110,), (0, 1, 2, 3, 4), tuple(gatings(SMALL)))
    sweep = replace(begun, kind="gates", grid=grid)
    long = Outcome(*[Spread(12.34, 12.34)] * 2, Spread(12345.67, 1234.56), Spread(53.98, 10.05))
    for name in ("done", "begun"):
        monkeypatch.setattr(Sweep, name, lambda sweep, point: point.seed < 4)
    monkeypatch.setattr(Sweep, "require_own", lambda sweep, runs: None)
    monkeypatch.setattr(progress_module, "read_run", lambda path: SimpleNamespace(records=[]))
    monkeypatch.setattr(progress_module, "timing_note", lambda runs: "")
    monkeypatch.setattr(Outcome, "of", lambda journals: long)
    pages = PlainConsole(width=80, file=io.StringIO())
    pages.print(sweep_table(sweep))
    lines = pages.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("digits, cifar-resnet, p_L 0.5, depth 110, 2 epochs;")
    shown = "│ balanced-subset │ 4 of 5 │ 12.34 ± 12.34 % │ 12346 ± 1235 │ 53.98 ± 10.05 │"
    assert shown in lines


def test_one_epoch_is_one_epoch(begun):
    assert ", 1 epoch;" in sweep_table(replace(begun, config=replace(SMALL, epochs=1))).title
    assert ", 2 epochs;" in sweep_table(begun).title


def test_the_share_of_the_work_counts_the_layers_that_run(begun):
    first, second, third = begun.grid.points()
    progress = SweepProgress(begun, Console(file=io.StringIO()))
    shares = []
    for point in (first, second, third):
        begun.path(point).mkdir()
        begun.fail(point, "why")
        progress.look([])
        shares.append(progress._work())
    assert shares == pytest.approx([8 * 0.65, 8 * (0.65 + 0.8), 8 * (0.65 + 0.8 + 1)])
