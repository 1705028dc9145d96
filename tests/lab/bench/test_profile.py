import time

import pytest

from stochastic_depth.lab.bench.profile import operators, pieces
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")
WORKLOAD = Workload(4, 16, 3, Runtime("cpu", "float32", 1, engine="program"))


def test_every_piece_is_timed_within_the_step():
    timed, step = pieces(14, WORKLOAD)
    began = time.perf_counter()
    losses = [step().item() for _ in range(2)]
    whole = time.perf_counter() - began
    assert losses[0] != losses[1]
    assert 0 < sum(map(sum, timed.seconds.values())) < whole
    counts = {name: len(seconds) for name, seconds in timed.seconds.items()}
    assert counts.pop("stem, forward") == counts.pop("stem, backward") == 2
    assert counts.pop("head, forward and backward") == 2
    for direction in ("forward", "backward"):
        assert counts.pop(f"block of 16 channels, {direction}") == 4
        for channels in (32, 64):
            assert counts.pop(f"block of {channels} channels, {direction}") == 2
            assert counts.pop(f"transition to {channels} channels, {direction}") == 2
    assert not counts


def test_operators_are_sorted_by_their_own_time():
    seconds = operators(WORKLOAD.step(CifarResNet(14)), steps=2)
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert seconds["aten::convolution_backward"] > 0
