import os
import signal

import pytest
from scipy.stats import linregress

from stochastic_depth.errors import RunError
from stochastic_depth.lab.bench import depth as bench
from stochastic_depth.lab.bench.depth import (
    Line,
    depths_up_to,
    fit_line,
    peak_memory,
    training_steps,
)
from stochastic_depth.lab.bench.workload import Workload
from stochastic_depth.lab.options import DEPTHS
from stochastic_depth.survival import Uniform
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime("cpu", "float32", 1)


def test_the_depths_end_with_the_deepest():
    assert depths_up_to(1202) == list(DEPTHS)
    assert depths_up_to(110) == [20, 56, 110]
    assert depths_up_to(32) == [20, 32]


def test_the_fitted_line_is_the_known_one():
    line = fit_line([20, 56, 110], [3 * depth + 7 for depth in (20, 56, 110)])
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((3, 7, 1))
    assert fit_line([1, 2], [5.0, 5.0]) == Line(0, 5, 1)


def test_the_fitted_line_is_that_of_scipy():
    depths, values = [20, 56, 110, 218], [1.0, 2.5, 4.0, 9.5]
    line, theirs = fit_line(depths, values), linregress(depths, values)
    assert line.slope == pytest.approx(theirs.slope)
    assert line.intercept == pytest.approx(theirs.intercept)
    assert line.r_squared == pytest.approx(theirs.rvalue**2)


def test_every_kind_and_depth_takes_a_step():
    steps = training_steps([8, 14], Workload(2, 16, 3, CPU))
    assert steps.keys() == {(k, d) for k in ("constant", "stochastic") for d in (8, 14)}
    assert all(step().isfinite() for step in steps.values())


def test_the_peak_grows_with_depth_and_less_so_under_stochastic_depth():
    workload = Workload(32, 32, 3, CPU)
    full = bytearray(2**29)  # of this process, and not of those that are measured
    shallow = peak_memory(20, None, workload, steps=1)
    assert shallow < len(full) / 2
    del full
    deep = peak_memory(56, None, workload, steps=1)
    # Of each block the inputs of its two convolutions and of the BatchNorms after them, less what
    # fits into memory that the process had freed before.
    stage = 32 * 16 * 32 * 32 * 4
    assert deep - shallow > 0.95 * 4 * 6 * (stage + stage / 2 + stage / 4)
    # A twentieth of a peak varies from process to process, so the rate is one that saves far more.
    assert peak_memory(56, Uniform(0.1), workload, steps=1) < 0.6 * deep


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(bench, "_peak_memory", killed)
    with pytest.raises(RunError, match=r"ResNet-8, constant depth, batch 2: .* smaller batch"):
        peak_memory(8, None, Workload(2, 16, 3, CPU))
