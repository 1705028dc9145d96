import pytest
import torch
from torch import nn

from stochastic_depth.lab.bench.workload import Workload, saved_for_backward, step_memory
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import apply
from stochastic_depth.survival import LinearDecay
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_kept_for_backward_is_counted_once():
    x = torch.ones(10, requires_grad=True) * 1

    def step():
        return (x * x * x).sum()

    assert saved_for_backward(step) == 2 * 10 * 4


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
def test_a_parameter_is_not_counted_though_a_view_of_it_is_kept(shape):
    layer, x = nn.Linear(4, 5), torch.randn(shape, requires_grad=True)
    assert saved_for_backward(lambda: layer(x)) == 4 * x.numel()


def test_stochastic_depth_keeps_less():
    workload = Workload(4, 16, 3, Runtime("cpu", "float32", 1))
    constant, stochastic = CifarResNet(20), CifarResNet(20)
    apply(stochastic, LinearDecay(0.1))
    kept = [step_memory(workload.step(model), "cpu", steps=2) for model in (constant, stochastic)]
    assert 0 < kept[1] < kept[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the peak of a step")
def test_on_a_gpu_the_peak_is_at_least_what_is_kept():
    workload = Workload(16, 32, 3, Runtime("cuda", "float32", 1))
    step = workload.step(CifarResNet(20))
    step()
    assert step_memory(step, "cuda") > saved_for_backward(step)
