import time

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent, Kernel

from stochastic_depth.lab.bench.profile import operators, own_seconds, pieces
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
    seconds = operators(WORKLOAD.step(CifarResNet(14)), steps=2, on_gpu=False)
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert seconds["aten::convolution_backward"] > 0


def event(name, start, end, kernels=(), **options):
    """An event as the profiler makes it; times are in microseconds."""
    made = FunctionEvent(0, name, 0, start, end, stack=[], use_device="cuda", **options)
    made.kernels = [Kernel(kernel, 0, duration) for kernel, duration in kernels]
    return made


def test_on_a_gpu_the_time_of_kernels_is_that_of_the_operators_that_launched_them():
    on_gpu = {"device_type": DeviceType.CUDA}
    events = [
        event("aten::linear", 0, 20, kernels=[("product kernel", 500)]),
        event("aten::add", 10, 14, kernels=[("add kernel", 30)]),
        event("Optimizer.step", 20, 90, is_user_annotation=True),
        event("product kernel", 100, 600, **on_gpu),
        event("add kernel", 700, 730, **on_gpu),
        event("Optimizer.step", 100, 730, is_user_annotation=True, **on_gpu),
    ]
    recorded = EventList(events, use_device="cuda")
    recorded._build_tree()  # the addition is called by the linear layer, within whose time it is
    seconds = own_seconds(recorded.key_averages(), 2, on_gpu=True)
    assert list(seconds) == ["aten::linear", "aten::add"]
    assert list(seconds.values()) == pytest.approx([250e-6, 15e-6])
    assert own_seconds(recorded.key_averages(), 1, on_gpu=False) == pytest.approx(
        {"Optimizer.step": 70e-6, "aten::linear": 16e-6, "aten::add": 4e-6}
    )
