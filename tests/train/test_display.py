import io
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from stochastic_depth.train import begin, fit
from stochastic_depth.train.display import Display, RunView, picture


def gates(text: str) -> torch.Tensor:
    return torch.tensor([character == "1" for character in text])


@pytest.mark.parametrize(
    ("drawn", "width", "shown"),
    [
        ("1101", 4, "██·█"),
        ("110100", 3, "█▒ "),
        ("100", 2, "▒ "),
        ("111010001", 3, "█░░"),
        ("", 4, ""),
    ],
)
def test_gates_are_drawn_from_the_first_block_on(drawn, width, shown):
    assert picture(gates(drawn), width) == shown


@pytest.mark.parametrize("shape", [(600,), (600, 8), (81,), (81, 8)])
def test_the_picture_of_any_number_of_blocks_fits(shape):
    assert 40 < len(picture(torch.ones(shape, dtype=torch.bool), 80)) <= 80


def test_gates_for_single_samples_are_drawn_in_shades():
    drawn = torch.stack([gates(text) for text in ("0000", "1000", "1100", "1110", "1111")])
    assert picture(drawn, 80) == " ░▒▓█"


def shown(small, path, console, quiet=False, label="mine"):
    run, images = begin(replace(small, epochs=1), path)
    with Display(console, quiet) as display:
        view = display.show(label)
        list(fit(run, images, view))
        pages = Console(width=80, file=io.StringIO())
        pages.print(view.render(80))
    return console.file.getvalue(), pages.file.getvalue()


def test_a_pipe_gets_plain_lines(small, path):
    text, _ = shown(small, path, Console(file=io.StringIO()))
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("mine epoch 0.4/1 loss 2.")
    assert all("% left 0:" in line and "\x1b" not in line for line in lines)


def test_the_lines_of_one_run_say_how_fast_it_is(small, path):
    text, _ = shown(small, path, Console(file=io.StringIO()), label="")
    assert re.fullmatch(r"(epoch .*% [\d,]+ img/s left 0:\d\d:\d\d\n){3}", text)


LONG = {
    "epoch": 163.6,
    "train_loss": 0.01234,
    "validation_error": 100.0,
    "test_error": 5.23,
    "images_per_second": 1423.4,
}


@pytest.mark.parametrize("label", ["", "stochastic-seed0"])
def test_a_line_fits_80_columns(label):
    lines = []
    view = RunView(label, lines.append, epochs=164)
    view.record(SimpleNamespace(**LONG))
    assert len(lines[0]) <= 80


def test_quiet_shows_nothing(small, path):
    assert shown(small, path, Console(file=io.StringIO()), quiet=True)[0] == ""


def test_a_terminal_gets_a_live_picture_and_short_lines(small, path):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    text, _ = shown(small, path, console)
    assert "\x1b" in text
    assert "% left 0:" not in text


def test_the_live_picture_fits_80_columns_and_shows_gates_and_figures(small, path):
    _, page = shown(small, path, Console(file=io.StringIO()))
    head, blocks, figures = page.splitlines()
    assert "epoch 1.0/1" in head
    assert len(blocks.strip()) == 6
    assert set(blocks.strip()) <= set("█·")
    assert figures.startswith("step 10  loss ")
    assert f"active {blocks.count('█')}/6" in figures
    assert max(map(len, page.splitlines())) <= 80
