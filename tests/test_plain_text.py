import shlex
from pathlib import Path

import pytest

from stochastic_depth.plain_text import command, epoch_text, si


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (999.7, "1 k"),
        (1234, "1.23 k"),
        (999_499, "999 k"),
        (999_700_000, "1 G"),
        (2.5e15, "2.5 P"),
    ],
)
def test_a_count_has_three_digits_and_a_prefix(count: float, shown: str) -> None:
    assert si(count) == shown


def test_a_shell_splits_a_command_into_the_arguments_it_was_made_of() -> None:
    path = Path("runs of $HOME/it's mine")
    printed = command("train", "--resume", path, "--seed", 3)
    assert printed.startswith("stochastic-depth train --resume '")
    assert shlex.split(printed)[1:] == ["train", "--resume", str(path), "--seed", "3"]
    assert command("train", "--resume", "runs/a") == "stochastic-depth train --resume runs/a"


@pytest.mark.parametrize(
    ("epoch", "shown"), [(0, "0"), (0.5, "0.5"), (3.98864, "3.99"), (100, "100"), (163.999, "164")]
)
def test_an_epoch_has_at_most_two_decimals(epoch: float, shown: str) -> None:
    assert epoch_text(epoch) == shown
