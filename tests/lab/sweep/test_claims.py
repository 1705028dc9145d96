"""Every point is given to exactly one worker, and comes back when its worker is gone."""

import multiprocessing
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.lab.sweep import workers
from stochastic_depth.lab.sweep.folder import open_sweep
from stochastic_depth.lab.sweep.workers import claim_next, read_claims
from support.small_sweep import GRID, SMALL


def end(sweep, claim):
    """End a point without training it: as one that has failed."""
    sweep.path(claim.point).mkdir(exist_ok=True)
    sweep.fail(claim.point, "it was not to be")
    claim.release()


def test_many_takers_get_every_point_exactly_once(tmp_path):
    grid = replace(GRID, seeds=tuple(range(10)))
    sweep = open_sweep(tmp_path / "many", "survival", grid, SMALL)

    def take_all(_):
        taken = []
        while claim := claim_next(sweep):
            taken.append(claim.point)
            end(sweep, claim)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [point for points in pool.map(take_all, range(4)) for point in points]
    assert Counter(taken) == Counter(grid.points())


def test_points_come_in_the_order_of_the_grid_and_are_held(sweep):
    claims = [claim_next(sweep) for _ in range(6)]
    assert [claim.point for claim in claims] == GRID.points()
    assert claim_next(sweep) is None
    assert read_claims(sweep) == GRID.points()


def test_a_point_that_was_let_go_comes_first(sweep):
    first, second = claim_next(sweep), claim_next(sweep)
    second.release()
    assert read_claims(sweep) == [first.point]
    again, third = claim_next(sweep), claim_next(sweep)
    assert (again.point, third.point) == (second.point, GRID.points()[2])
    assert first.lock.is_locked


def hold(sweep, held):
    claim = claim_next(sweep)
    held.set()
    time.sleep(600)
    claim.release()


def test_a_point_whose_process_was_killed_comes_back(sweep):
    context = multiprocessing.get_context("fork")
    held = context.Event()
    worker = context.Process(target=hold, args=(sweep, held), daemon=True)
    worker.start()
    assert held.wait(60)
    second = claim_next(sweep)
    assert second.point == GRID.points()[1]
    assert read_claims(sweep) == GRID.points()[:2]
    worker.kill()
    worker.join()
    assert read_claims(sweep) == GRID.points()[1:2]
    assert claim_next(sweep).point == GRID.points()[0]


def test_points_that_ended_are_not_given_again(sweep):
    for _ in range(6):
        end(sweep, claim_next(sweep))
    assert claim_next(sweep) is None
    assert read_claims(sweep) == []


def test_a_point_that_ended_after_the_first_look_is_not_given(sweep, monkeypatch):
    first = GRID.points()[0]
    looks = Counter()

    def ended(self, point):
        looks[point] += 1
        return point == first and looks[point] > 1

    monkeypatch.setattr(type(sweep), "ended", ended)
    assert claim_next(sweep).point == GRID.points()[1]


def test_a_look_at_the_claims_disturbs_no_worker(sweep, monkeypatch):
    for point in GRID.points():  # a claim that nobody holds any more
        (sweep.folder / "claims" / point.name).touch()
    done, trained = threading.Event(), []

    def train_point(sweep, point, stop):
        trained.append(point)
        sweep.path(point).mkdir()
        sweep.fail(point, "it was not to be")

    def look():
        while not done.is_set():
            read_claims(sweep)

    monkeypatch.setattr(workers, "train_point", train_point)
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        try:
            workers.work(sweep, lambda: None)
        finally:
            done.set()
        looking.result()
    assert Counter(trained) == Counter(GRID.points())


def test_a_run_that_was_taken_away_is_given_again(sweep):
    for _ in range(6):
        end(sweep, claim_next(sweep))
    point = GRID.points()[3]
    shutil.rmtree(sweep.path(point))
    assert claim_next(sweep).point == point


def test_a_folder_that_cannot_be_written_is_one_sentence(sweep):
    shutil.rmtree(sweep.folder / "claims")
    (sweep.folder / "claims").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        claim_next(sweep)
