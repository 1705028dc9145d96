import re
import runpy
from pathlib import Path

from stochastic_depth.cli import COMMANDS
from stochastic_depth.recipes import RECIPES

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_blocks_run_one_after_the_other(capsys, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "example.py").write_text("".join(blocks))
    names = runpy.run_path(str(tmp_path / "example.py"))
    first, *tables = capsys.readouterr().out.splitlines()
    told = re.fullmatch(r"(\d+) of 54 blocks ran; 40.25 expected", first)
    assert told
    for line in ("24 of 24 blocks skippable", "26.0 % saved", "24 blocks verified in 27 sets"):
        assert sum(line in row for row in tables) == 1, line
    assert 20 < int(told[1]) <= 54
    assert len(names["handle"].survival) == 24


def test_every_recipe_and_no_other_is_in_the_table():
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(RECIPES)


def test_it_shows_every_command():
    shown = re.findall(r"^stochastic-depth (\w+)", README, re.MULTILINE)
    assert set(shown) == set(COMMANDS)


def test_the_files_it_points_to_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
