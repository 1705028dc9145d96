"""The queue gives every point to exactly one worker, on whichever storage it is kept."""

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from small_sweep import GRID, SMALL, trials

from stochastic_depth.errors import ConfigError, RunError
from stochastic_depth.lab.sweep.folder import open_sweep
from stochastic_depth.lab.sweep.workers import Queue


def end(sweep, queue, claim):
    """End a point without training it: as one that has failed."""
    sweep.path(claim.point).mkdir(exist_ok=True)
    sweep.fail(claim.point, "it was not to be")
    queue.end(claim)
    claim.lock.release()


def test_many_takers_get_every_point_exactly_once(tmp_path, url):
    grid = replace(GRID, seeds=tuple(range(10)))
    sweep = open_sweep(tmp_path / "many", "survival", grid, SMALL)

    def take_all(_):
        queue, taken = Queue(sweep, url), []
        while claim := queue.take():
            taken.append(claim.point)
            end(sweep, queue, claim)
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = [point for points in pool.map(take_all, range(4)) for point in points]
    assert Counter(taken) == Counter(grid.points())


def test_points_come_in_the_order_of_the_grid_and_are_held(sweep, url):
    one, other = Queue(sweep, url), Queue(sweep, url)
    claims = [queue.take() for queue in (one, other) * 3]
    assert [claim.point for claim in claims] == GRID.points()
    assert one.take() is None
    assert one.running() == other.running() == GRID.points()


def test_a_point_whose_worker_is_gone_comes_first_and_is_the_same_trial(sweep, url):
    queue = Queue(sweep, url)
    first, second = queue.take(), queue.take()
    second.lock.release()
    again = Queue(sweep, url).take()
    assert (again.point, again.number) == (second.point, second.number)
    assert Queue(sweep, url).take().point == GRID.points()[2]
    assert first.lock.is_locked


def test_points_that_ended_are_not_given_again(sweep, url):
    queue = Queue(sweep, url)
    for _ in range(6):
        end(sweep, queue, queue.take())
    assert queue.take() is None
    assert Queue(sweep, url).take() is None
    assert queue.running() == []


def test_a_run_that_was_taken_away_is_given_again(sweep, url):
    queue = Queue(sweep, url)
    for _ in range(6):
        end(sweep, queue, queue.take())
    point = GRID.points()[3]
    shutil.rmtree(sweep.path(point))
    assert queue.take().point == point


def test_the_record_can_be_read_with_optuna(sweep, url):
    queue = Queue(sweep, url)
    end(sweep, queue, queue.take())
    found = trials(sweep, url)
    assert [trial.state.name for trial in found] == ["FAIL"] + 5 * ["WAITING"]
    assert [trial.user_attrs["run"] for trial in found] == [p.name for p in GRID.points()]
    assert found[1].params == {"rule": "linear", "survival": 0.6, "depth": 8, "seed": 0}
    assert found[2].params == {"rule": "constant", "depth": 8, "seed": 0}


def test_a_line_that_a_killed_process_left_half_written_is_dropped(sweep):
    queue = Queue(sweep)
    end(sweep, queue, queue.take())
    with (sweep.folder / "queue.jsonl").open("ab") as file:
        file.write(b'{"op_code":5,"worker_id":"x')
    claims = queue.take(), Queue(sweep).take()
    assert [claim.point for claim in claims] == GRID.points()[1:3]


def test_a_lost_queue_is_made_anew_from_the_run_folders(sweep):
    queue = Queue(sweep)
    for _ in range(5):
        end(sweep, queue, queue.take())
    (sweep.folder / "queue.jsonl").unlink()
    queue = Queue(sweep)
    for _ in range(6):
        claim = queue.take()
        assert sweep.ended(claim.point) == (claim.point != GRID.points()[5])
        queue.end(claim) if sweep.ended(claim.point) else end(sweep, queue, claim)
    assert queue.take() is None


def test_a_damaged_queue_is_one_sentence_with_the_remedy(sweep):
    Queue(sweep).take()
    (sweep.folder / "queue.jsonl").write_bytes(b"\x80garbage\n" * 3)
    with pytest.raises(RunError, match=r"queue\.jsonl.*delete it"):
        Queue(sweep)


def test_a_server_that_is_not_there_is_one_sentence_without_the_password(sweep):
    with pytest.raises(RunError, match="queue of the sweep cannot be used") as told:
        Queue(sweep, "postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_another_kind_of_server_is_refused(sweep):
    with pytest.raises(ConfigError, match="must begin with postgresql://"):
        Queue(sweep, "mysql://root@localhost/x")
