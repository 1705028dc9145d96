"""What of a comparison fits into a given time, and that it is what is then trained."""

import io
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from stochastic_depth.cli.console import PlainConsole
from stochastic_depth.cli.train import _fit_epochs
from stochastic_depth.lab import comparison
from stochastic_depth.lab.comparison import compare_runs, runs_in, train_pairs
from stochastic_depth.lab.pace import FEWEST_EPOCHS, Pace, measure_pace
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig
from stochastic_depth.train.display import Display
from support.runs import unseen

SMALL = replace(RECIPES["digits"](), model=ModelConfig(depth=8), epochs=1)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_faster_number_of_threads_is_taken_and_said():
    pace = Pace({1: 0.2, 4: 0.05}, steps_per_epoch=10, saving=0.25)
    assert pace.threads == 4
    assert str(pace) == ("a step takes 0.20 s with 1 thread, 0.05 s with 4 threads: taking 4")
    assert Pace({1: 0.05, 4: 0.2}, 10, 0.25).threads == 1


def test_as_many_epochs_as_fit_but_never_too_few_to_show_anything():
    pace = Pace({1: 0.1}, steps_per_epoch=10, saving=0.25)
    both = 10 * 0.1 * (1 + 0.75)
    for seconds in (15, 20, 40):
        epochs = pace.epochs_in(seconds, 100)
        assert 1.5 * both * epochs < seconds < 2.5 * both * (epochs + 1)
    assert pace.epochs_in(1000, 20) == 20
    assert pace.epochs_in(1, 20) == FEWEST_EPOCHS
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
    assert runs_in(tmp_path, [0, 1]) == []
    first = train_pairs(SMALL, [0, 1], tmp_path, unseen(), lambda: None, time.monotonic())
    assert [run.config.seed for run in first["constant"]] == [0]
    assert runs_in(tmp_path, [0, 1])[0].id == first["constant"][0].id
    later = time.monotonic() + 1e6
    second = train_pairs(SMALL, [0, 1], tmp_path, unseen(), lambda: None, later)
    assert [run.config.seed for run in second["stochastic"]] == [0, 1]
    assert [run.id for run in first["constant"]] == [run.id for run in second["constant"][:1]]


class SlowTurns:
    """A clock on which a turn takes as many seconds as the list says."""

    def __init__(self, seconds):
        self.now, self.turns = 0.0, iter(seconds)

    def records(self, epochs):
        for epoch in range(1, epochs + 1):
            self.now += next(self.turns)
            yield SimpleNamespace(epoch=epoch)


@pytest.mark.parametrize(
    ("seconds", "end", "trained"),
    [
        ([10] * 4, 40, 4),
        ([10] * 4, 39, 3),
        ([10, 25, 10, 10], 69, 3),  # the machine became busy, and may be again
        ([10, 25, 10, 10], 70, 4),
        ([10] * 4, 1, 1),
    ],
)
def test_no_epoch_is_begun_that_would_end_too_late_when_the_machine_gets_slower(
    monkeypatch, seconds, end, trained
):
    clock, came = SlowTurns(seconds), []
    monkeypatch.setattr(comparison.time, "monotonic", lambda: clock.now)

    def counted():
        for record in clock.records(4):
            came.append(record)
            yield record

    done = comparison._take_turns([counted(), (_ for _ in ())], 4, end)
    assert len(came) == trained
    assert done is (trained == 4)


def test_what_was_cut_short_is_compared_as_far_as_it_came_and_goes_on(tmp_path):
    two = replace(SMALL, epochs=2)
    first = train_pairs(two, [0, 1], tmp_path, unseen(), lambda: None, time.monotonic())
    assert {kind: [len(run.records()) for run in of] for kind, of in first.items()} == {
        "constant": [1],
        "stochastic": [1],
    }
    assert compare_runs(first).series[0].outcome.test_error_last.deviation is None
    again = train_pairs(two, [0], tmp_path, unseen(), lambda: None, time.monotonic() + 1e6)
    assert [len(run.records()) for of in again.values() for run in of] == [2, 2]
    assert all(run.weights.exists() for of in again.values() for run in of)


def test_a_comparison_goes_on_with_the_epochs_and_threads_it_began_with(tmp_path, monkeypatch):
    console, shown = PlainConsole(file=io.StringIO()), io.StringIO()
    torch.set_num_threads(1)
    two = replace(SMALL, epochs=2)
    train_pairs(two, [0, 1], tmp_path, unseen(), lambda: None, time.monotonic())
    torch.set_num_threads(2)
    measured = "stochastic_depth.lab.pace.measure_pace"
    monkeypatch.setattr(measured, lambda config: pytest.fail("it was measured"))
    end = time.monotonic() + 1e6
    config = _fit_epochs(replace(SMALL, epochs=20), [0, 1], tmp_path, end, console)
    assert config == two
    with Display(Console(file=shown)) as display:
        runs = train_pairs(config, [0, 1], tmp_path, display, lambda: None, end)
    assert "resuming at step 10 of 20" in shown.getvalue()
    assert "rounded differently" not in shown.getvalue()
    assert {run.runtime.threads for of in runs.values() for run in of} == {1}
    assert "training for 2 of 20 epochs" in console.file.getvalue()
