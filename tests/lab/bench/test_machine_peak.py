import time

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from stochastic_depth.block_program.library import why_unavailable
from stochastic_depth.lab.bench import peers, skip
from stochastic_depth.lab.bench.costs import MachinePeak, machine_peak, step_flops
from stochastic_depth.lab.bench.workload import PlainResNet, Workload
from stochastic_depth.lab.options import PeersOptions, SkipOptions
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Runtime("cpu", "float32", 1)
needs_a_compiler = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


def test_flops_of_a_step_are_two_for_each_multiply_add_three_times_but_for_the_stem():
    batch, side = 2, 16
    forward = 0
    for size, into, out, count in ((16, 16, 16, 2), (8, 16, 32, 1), (8, 32, 32, 1)):
        forward += count * size**2 * 9 * into * out
    forward += 4**2 * 9 * (32 * 64 + 64 * 64) + 64 * 10
    stem = side**2 * 9 * 3 * 16  # the gradient of the images is not wanted
    expected = 2 * batch * (3 * forward + 2 * stem)
    assert step_flops(Workload(batch, side, 3, CPU).step(PlainResNet(8))) == expected


def test_attention_counts_its_two_products_and_two_and_a_half_times_as_much_backward():
    batch, heads, tokens, width = 2, 3, 5, 8
    q, k, v = torch.randn(3, batch, heads, tokens, width, requires_grad=True).unbind()
    product = 2 * batch * heads * tokens**2 * width

    def step():
        F.scaled_dot_product_attention(q, k, v).sum().backward()

    assert step_flops(step) == 2 * product + 5 * product


def test_a_share_of_the_peak_is_flops_over_the_flops_of_that_time():
    machine = MachinePeak(flops_per_second=1e9, flops_per_step=500_000_000)
    assert machine.timing.median == pytest.approx(0.5)
    assert machine.share(1.0) == pytest.approx(0.5)
    assert machine.share(1.0, active=0.5) == pytest.approx(0.25)
    assert machine.to_json({"a": 2.0})["of_the_peak"] == {"a": pytest.approx(0.25)}


@needs_a_compiler
def test_benchmarks_say_how_near_to_the_peak_they_come():
    console = Console(record=True, width=200)
    options = SkipOptions(repeats=2, depth=8, batch=4, size=16)
    result = skip.measure(options, CPU, console)
    console.print(*skip.tables(result, options, CPU))
    found = result.to_json()
    shares = [row["of_the_peak"] for row in found["alternatives"].values()]
    assert all(0 < share < 1 for share in shares)
    options = PeersOptions(repeats=2, depth=8, batch=4, size=16)
    result = peers.measure(options, CPU, console)
    console.print(*peers.tables(result, options, CPU))
    found = result.to_json()
    assert 0 < found["peak"]["of_the_peak"]["constant depth"] < 1
    assert console.export_text().count("at the machine's peak") == 2


def test_where_the_peak_cannot_be_measured_there_is_no_row(monkeypatch):
    step = Workload(2, 16, 3, CPU).step(PlainResNet(8))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert machine_peak(CPU, step) is None


@needs_a_compiler
def test_a_product_of_matrices_is_below_the_peak():
    a = torch.randn(256, 256)
    machine = machine_peak(CPU, lambda: a @ a)
    assert machine is not None
    assert machine.flops_per_step == 2 * 256**3

    def seconds():
        began = time.thread_time()
        a @ a
        return time.thread_time() - began

    fastest = min(seconds() for _ in range(200))
    assert 0.1 < machine.share(fastest) < 1.1  # of a peak that was measured a moment before
