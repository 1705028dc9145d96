"""What of a comparison fits into a given time, and that it is what is then trained."""

import time
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from stochastic_depth.lab.comparison import train_pairs
from stochastic_depth.lab.pace import LEAST_EPOCHS, Pace, epochs_of, measure_pace
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig
from stochastic_depth.train.display import Display

SMALL = replace(RECIPES["digits"](), model=ModelConfig(depth=8), epochs=1)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_faster_number_of_threads_is_taken_and_said():
    pace = Pace({1: 0.2, 4: 0.05}, steps_per_epoch=10, saving=0.25)
    assert pace.threads == 4
    assert pace.described() == (
        "a step takes 0.20 s with 1 thread, 0.05 s with 4 threads: taking 4"
    )
    assert Pace({1: 0.05, 4: 0.2}, 10, 0.25).threads == 1


def test_as_many_epochs_as_fit_but_never_too_few_to_show_anything():
    pace = Pace({1: 0.1}, steps_per_epoch=10, saving=0.25)
    both = 10 * 0.1 * (1 + 0.75)
    for seconds in (10, 20, 40):
        assert (
            both * pace.epochs_in(seconds, 100) < seconds < 2 * both * pace.epochs_in(seconds, 100)
        )
    assert pace.epochs_in(1000, 20) == 20
    assert pace.epochs_in(1, 20) == LEAST_EPOCHS
    assert pace.epochs_in(1, 2) == 2


def test_measuring_takes_steps_with_one_thread_and_with_all_and_leaves_the_better():
    torch.set_num_threads(2)
    pace = measure_pace(SMALL)
    assert set(pace.seconds) == {1, 2}
    assert torch.get_num_threads() == pace.threads
    assert pace.steps_per_epoch == 10
    assert all(0 < seconds < 30 for seconds in pace.seconds.values())
    assert 0 < pace.saving < 0.5


def test_no_seed_is_begun_that_would_end_too_late_and_a_later_call_goes_on(tmp_path):
    display = Display(Console(quiet=True), quiet=True)
    assert epochs_of(tmp_path, SMALL, [0, 1]) is None
    first = train_pairs(SMALL, [0, 1], tmp_path, display, lambda: None, time.monotonic())
    assert [run.config.seed for run in first["constant"]] == [0]
    assert epochs_of(tmp_path, replace(SMALL, epochs=20), [0, 1]) == 1
    later = time.monotonic() + 1e6
    second = train_pairs(SMALL, [0, 1], tmp_path, display, lambda: None, later)
    assert [run.config.seed for run in second["stochastic"]] == [0, 1]
    assert [run.id for run in first["constant"]] == [run.id for run in second["constant"][:1]]
