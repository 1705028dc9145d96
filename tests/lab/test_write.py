import base64
import csv
import hashlib
import io
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from itertools import islice
from pathlib import Path

import pytest

from stochastic_depth.cli import main
from stochastic_depth.errors import RunError
from stochastic_depth.lab.page import REFRESH, watch_report, write_report
from stochastic_depth.lab.recorded import read_sources
from stochastic_depth.lab.report import COMMANDS, build_report
from stochastic_depth.lab.sweep.folder import open_sweep
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig, begin, fit
from support.runs import SILENT
from support.small_sweep import GRID, SMALL

ADDRESSES = {"href", "xlink:href", "src", "srcset", "action", "formaction", "data", "poster"}


class Elements(HTMLParser):
    """Names of elements and of attributes, addresses, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.addresses, self.text = set(), set(), set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses |= {value for name, value in attrs if name in ADDRESSES}

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def html(page) -> str:
    return page.read_text()


def test_every_figure_is_on_the_page_in_two_widths_with_its_sentence_and_its_data(html):
    ids = re.findall(r'<figure id="([^"]+)">', html)
    assert len(ids) == len(set(ids)) == 11
    assert len(re.findall(r"<svg[^>]* viewBox", html)) == 22
    assert html.count('class="sentence"') == 11
    assert "NaN" not in html
    assert "undefined" not in html
    for data in re.findall(r'href="data:text/csv;charset=utf-8;base64,([^"]+)"', html):
        rows = list(csv.DictReader(io.StringIO(base64.b64decode(data).decode())))
        assert rows
        assert None not in rows[0]


def test_the_page_asks_nothing_of_a_network(html):
    elements = Elements(html)
    assert len(elements.addresses) == 12
    assert all(address.startswith("data:") for address in elements.addresses)
    assert not {"iframe", "object", "embed", "img", "image", "use"} & elements.tags
    (style,) = re.findall("<style>(.*?)</style>", html, re.DOTALL)
    assert "@import" not in style
    assert "url(" not in style


def test_the_policy_of_the_page_knows_its_script_alone(html):
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    assert f"{policy}script-src 'sha256-{digest}'" in html


def test_names_are_text(html, hostile, hostile_page):
    harmless, shown = Elements(html), Elements(hostile_page.read_text())
    assert shown.tags <= harmless.tags | {"pre", "code"}  # commands for further figures
    assert shown.attributes <= harmless.attributes
    assert hostile[0] in "".join(shown.text)


def test_files_of_figures_are_written_beside(survival_sweep, benchmark_file, tmp_path, capsys):
    out, figures = tmp_path / "deep" / "report.html", tmp_path / "figures"
    runs = [str(survival_sweep), str(benchmark_file)]
    assert main(["report", *runs, "-o", str(out), "--figures", str(figures)]) == 0
    assert capsys.readouterr().out == f"{out}: 2 figures\n"
    assert COMMANDS["depth-sweep"] in out.read_text()
    assert COMMANDS["survival-sweep"] not in out.read_text()
    drawn = {path.stem for path in figures.glob("*.svg")}
    assert drawn == {path.stem for path in figures.glob("*.png")}
    assert drawn == {path.stem for path in figures.glob("*.csv")}
    sweep = "p-l-at-one-depth-resnet-14-on-digits-1-epoch"
    assert drawn == {f"{sweep}-survival-sweep", "cost-of-depth-depth-cost"}
    for path in figures.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in figures.glob("*.svg"):
        assert path.read_text().startswith("<svg")
        assert "prefers-color-scheme:dark" in path.read_text()


def test_nothing_to_report_is_an_error_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "report.html"
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), "-o", str(out)]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert not out.exists()
    assert main(["report"]) == 2


def test_a_run_without_a_record_is_said_to_have_begun(tmp_path, compared):
    run = tmp_path / "begun"
    run.mkdir()
    (run / "config.json").write_bytes((compared / "constant-seed0" / "config.json").read_bytes())
    out = tmp_path / "report.html"
    write_report([run], out)
    assert "1 run, 1 not finished" in out.read_text()
    assert "0 of 2 epochs" in out.read_text()


def test_a_run_that_failed_before_its_first_record_is_told_to_have_failed(tmp_path, compared):
    run, why = tmp_path / "diverged", "the loss is not finite at step 3"
    run.mkdir()
    (run / "config.json").write_bytes((compared / "constant-seed0" / "config.json").read_bytes())
    (run / "failed.txt").write_text(f"{why}\n")
    (section,) = build_report(read_sources([run])).sections
    assert section.title == "Runs that have failed"
    assert section.sentence == f"Failed before the first record: {run} ({why})."
    assert not section.figures


def test_a_watched_report_is_written_anew_until_every_run_is_finished(tmp_path):
    config = replace(RECIPES["digits"](), model=ModelConfig(depth=8), epochs=2)
    run, images = begin(config, tmp_path / "runs" / "one")
    out = tmp_path / "report.html"
    training = fit(run, images, SILENT)
    next(training)
    watching = watch_report([tmp_path / "runs"], out, every=0.05)
    next(watching)
    assert f'data-refresh="{REFRESH}"' in out.read_text()
    assert '<p class="state">After 1 of 2 epochs.</p>' in out.read_text()
    next(training)
    next(watching)
    assert f'data-refresh="{REFRESH}"' in out.read_text()
    assert list(training) == []
    assert len(list(watching)) == 1
    assert "data-refresh" not in out.read_text()
    assert "finished" in out.read_text()


@pytest.mark.parametrize("out", ["report.html", "one/report.html"])
def test_a_watched_report_is_not_written_anew_for_its_own_sake(
    out, tmp_path, compared, monkeypatch
):
    """A page beside the runs, or in the folder of one, changes the time of that folder."""
    runs, turns = tmp_path / "runs", []
    shutil.copytree(compared / "constant-seed0", runs / "one")
    (runs / "one" / "model.safetensors").unlink()

    def sleep(seconds):
        turns.append(seconds)
        if len(turns) == 3:
            shutil.copytree(compared / "stochastic-seed0", runs / "two")
        if len(turns) == 6:
            shutil.copy(compared / "constant-seed0" / "model.safetensors", runs / "one")

    monkeypatch.setattr("stochastic_depth.lab.page.time.sleep", sleep)
    written = [len(turns) for _ in islice(watch_report([runs], runs / out), 4)]
    assert written == [0, 3, 6]


def test_an_unreadable_analysis_leaves_the_report_that_was_there(compared, tmp_path):
    out = tmp_path / "report.html"
    out.write_text("before")
    run = tmp_path / "run"
    (run / "analysis").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (run / name).write_bytes((compared / "stochastic-seed0" / name).read_bytes())
    (run / "analysis" / "pruning.json").write_text("{")
    with pytest.raises(RunError, match=r"pruning.json is not a JSON file"):
        write_report([run], out)
    assert out.read_text() == "before"


ALWAYS = {
    "training-curves",
    "training-time",
    "drop-rates",
    "gradient-strength",
    "active-blocks",
    "block-gradients",
}
"""Figures that need no command of their own: the journals of any runs hold what they draw."""


def test_every_figure_that_needs_more_than_journals_has_a_command():
    folder = resources.files("stochastic_depth.lab")
    sources = [path.read_text() for path in Path(str(folder)).rglob("*.py")]
    ids = {id for source in sources for id in re.findall(r'\bid="([a-z-]+)"', source)}
    of_inspect = {"open-and-closed", "cost-of-blocks"}
    assert ids - of_inspect - ALWAYS == set(COMMANDS)


def test_the_commands_of_figures_that_are_not_drawn_are_told(compared):
    made = build_report(read_sources([compared]))
    ids = {figure.id for section in made.sections for figure in section.figures}
    assert set(made.commands) == {command for id, command in COMMANDS.items() if id not in ids}


def test_a_sweep_whose_runs_failed_or_go_on_is_told_in_place_of_its_figure(tmp_path, capsys):
    sweep = open_sweep(tmp_path / "sweep", "survival", GRID, SMALL)
    points, out = GRID.points(), tmp_path / "report.html"
    for failed, point in enumerate(points):
        assert main(["report", str(sweep.folder), "-o", str(out)]) == 0
        how = f", {failed} failed, for the reason" if failed else "."
        assert f"{sweep.folder}: 0 of 6 runs finished{how}" in capsys.readouterr().out
        run, _ = begin(sweep.configs[point], sweep.path(point))
        (run.path / "failed.txt").write_text("the loss is not finite")
    assert main(["report", str(sweep.folder), "-o", str(out)]) == 0
    why = "0 of 6 runs finished, 6 failed, for the reason in the failed.txt of each."
    assert why in capsys.readouterr().out
    assert why in out.read_text()
    assert '<p class="state">6 runs, 6 failed. Written' in out.read_text()
    assert len(list(watch_report([sweep.folder / "runs"], out))) == 1
