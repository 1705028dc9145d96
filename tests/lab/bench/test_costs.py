import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import stochastic_depth as sd
from stochastic_depth.lab.bench.costs import StepCost, step_costs, step_flops
from stochastic_depth.lab.bench.workload import PlainResNet, Workload, saved_for_backward
from stochastic_depth.models import VisionTransformer
from stochastic_depth.train.runtime import Runtime

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = Runtime("cpu", "float32", 1)
QUIET = Console(quiet=True)


def test_costs_are_means_but_for_the_peak_and_relative_to_another():
    workload = Workload(4, 8, 3, CPU)
    handles = []

    def build():
        steps = {}
        for name, p in (("whole", 1.0), ("dropped", 0.5)):
            model = VisionTransformer(3)
            handles.append(sd.apply(model, sd.Uniform(p)))
            steps[name] = workload.step(model)
        return steps

    costs = step_costs(build, 6, CPU, QUIET)
    whole, dropped = costs["whole"], costs["dropped"]
    assert whole.kept == whole.peak_kept
    gates = torch.stack([handles[-1].gates_at(step) for step in range(6)]).sum(1)
    relative = dropped.relative_to(whole)
    assert relative.flops == pytest.approx(gates.float().mean().item() / 6, abs=0.15)
    assert relative.flops < 1
    assert dropped.kept <= dropped.peak_kept <= whole.peak_kept
    assert StepCost(2, 4, 6, 8).relative_to(StepCost(1, 2, 3, 4)) == StepCost(2, 2, 2, 2)


def test_a_graph_that_is_given_up_before_the_backward_pass_is_not_kept():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def step(detached):
        def given(out):
            return out.detach() if detached else out

        (second(x) + given(torch.tanh(first(x)))).sum().backward()

    assert saved_for_backward(lambda: step(True)) == x.nbytes
    assert saved_for_backward(lambda: step(False)) == 2 * x.nbytes


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
