import re
import runpy
from pathlib import Path

from stochastic_depth.cli import COMMANDS
from stochastic_depth.cli.analyze import QUESTIONS
from stochastic_depth.cli.bench import BENCHMARKS
from stochastic_depth.cli.sweep import OPTIONS
from stochastic_depth.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS_PAGE = (ROOT / "docs" / "commands.md").read_text()


def test_its_python_runs_and_prints_what_ran_and_what_is_saved(capsys, tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(block)
    names = runpy.run_path(str(tmp_path / "example.py"))
    first, *table = capsys.readouterr().out.splitlines()
    shown = re.fullmatch(r"(\d+) of 24 blocks ran; 17.75 expected", first)
    assert shown
    assert int(shown[1]) == names["handle"].gates.sum()
    assert 8 < int(shown[1]) <= 24
    assert sum("26.0 % saved" in row for row in table) == 1


def test_it_sells_in_a_minute():
    assert len(README.split()) < 800


def test_every_recipe_and_no_other_is_in_the_table_of_recipes():
    rows = [line for line in COMMANDS_PAGE.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(RECIPES)


def test_every_command_is_shown():
    shown = re.findall(r"^stochastic-depth (\w+) +(\w*)", COMMANDS_PAGE, re.MULTILINE)
    assert {command for command, _ in shown} == set(COMMANDS)
    for command, choices in (("analyze", QUESTIONS), ("bench", BENCHMARKS), ("sweep", OPTIONS)):
        assert {name for found, name in shown if found == command} == set(choices)


def test_the_files_it_points_to_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
