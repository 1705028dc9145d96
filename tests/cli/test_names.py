"""Names from files and runs are printed as text, whatever is in them."""

import io
import os
import subprocess
import sys

import pytest
from rich.table import Table
from rich.text import Text

from stochastic_depth.cli import main
from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.plain_text import escaped

NAMES = [
    "[bold]x[/bold]",
    "[/nothing]",
    ":smile:",
    "\x1b[31mred\x1b]0;title\x07",
    "a\rb\x08c",
    "\u202etxt",
]
SMALL = ["--model.depth", "8", "--epochs", "1"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — ünï 文", "plain — ünï 文"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\rb\x00\x7f\x9b", r"a\rb\x00\x7f\x9b"),
        ("\u202e\u200b", r"\u202e\u200b"),
        (os.fsdecode(b"\xff"), r"\udcff"),
        ("a\n\tb", "a\n\tb"),
    ],
)
def test_what_could_drive_a_terminal_is_written_as_an_escape(text, shown):
    assert escaped(text) == shown


@pytest.mark.parametrize("name", NAMES)
def test_a_console_shows_names_as_they_are(name):
    console = PlainConsole(file=io.StringIO(), width=80)
    table = Table(title=name, caption=name)
    table.add_column(name)
    table.add_row(name)
    console.print(table)
    console.print(name)
    shown = console.file.getvalue()
    assert shown.count(escaped(name)) == 5
    assert "\x1b" not in shown


@pytest.mark.parametrize("name", NAMES)
def test_nothing_reaches_the_terminal_past_the_console(name):
    console = PlainConsole(file=io.StringIO(), width=80)
    table = Table(title=Text(name))
    table.add_row(Text(name))
    console.print(table, Text(name))
    assert all(character.isprintable() for line in told_lines(console) for character in line)


def told_lines(console):
    return console.file.getvalue().split("\n")


@pytest.mark.parametrize("name", [name for name in NAMES if "/" not in name])
def test_a_run_of_any_name_is_trained_and_told(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "digits", *SMALL, "--run", name]) == 0
    assert main(["eval", name]) == 0
    assert main(["analyze", "active", name]) == 0
    assert main(["analyze", "ensemble", name, "--subnetworks", "1"]) == 0
    assert main(["analyze", "gradients", name]) == 0
    assert main(["train", "digits", *SMALL, "--run", name]) == 1
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert escaped(name) in shown.out
    assert escaped(name) in shown.err


def test_a_name_that_is_no_text_is_told(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stochastic_depth", "eval", b"\xff\x1b[31m"],
        capture_output=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(rb"error: \udcff\x1b[31m is not a run folder")


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("kinds", [1, 5, 14])
def test_no_number_in_a_table_is_shortened(kinds, terminal):
    """However narrow the console is; with fewer columns a table keeps within it."""
    table = Table(title="errors", caption="of 3 runs")
    numbers = [f"{n + 1}0.12345678 ± {n + 1}.5" for n in range(kinds)]
    for n in range(kinds):
        table.add_column(f"linear decay to 0.{n}", justify="right", no_wrap=n == 3)
    table.add_row(*numbers)
    console = PlainConsole(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    console.print(table)
    shown = console.file.getvalue()
    assert "…" not in shown
    for number in numbers:
        assert number.split()[0] in shown
    assert (max(map(len, shown.splitlines())) <= 80) == (kinds < 6)
