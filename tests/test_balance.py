"""Balanced gates in a model: `sd.apply(model, balance=True)`."""

import numpy as np
import pytest
import torch
from torch import nn

import stochastic_depth as sd

pytestmark = pytest.mark.usefixtures("one_thread")


def network(blocks: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(blocks)))


def test_every_step_is_of_the_expected_depth_and_a_resume_goes_on():
    model = network()
    handle = sd.apply(model, sd.LinearDecay(0.5), balance=True, seed=3)
    counts = []
    for _ in range(30):
        model(torch.randn(2, 4))
        counts.append(int(handle.gates.sum()))
    assert set(counts) == {5, 6}  # the sum is 5.75
    other = network()
    resumed = sd.apply(other, sd.LinearDecay(0.5), balance=True)
    resumed.load_state_dict(handle.state_dict())
    for step in range(30, 40):
        model(torch.randn(2, 4))
        other(torch.randn(2, 4))
        assert torch.equal(handle.gates, resumed.gates)
        assert torch.equal(handle.gates, handle.gates_at(step))
    assert "balanced" in repr(handle)
    with pytest.raises(
        sd.errors.StateError, match=r"saved state has balance=True, this model False"
    ):
        sd.apply(network(), sd.LinearDecay(0.5)).load_state_dict(handle.state_dict())


@pytest.mark.parametrize(("multiple", "sizes"), [(1, [10, 7, 5, 2]), (8, [8, 8, 8, 8])])
def test_branches_run_on_subsets_of_one_size(multiple, sizes):
    model = network(4)
    rule, form = [0.83, 0.6, 0.4, 0.2], {"balance": True, "multiple_of": multiple}
    sd.apply(model, rule, gate="subset", scale="training", seed=1, **form)
    seen = [[], [], [], []]
    for number, unit in enumerate(model):
        unit.branch.register_forward_hook(
            lambda _, args, __, number=number: seen[number].append(len(args[0]))
        )
    for _ in range(20):
        model(torch.randn(12, 4)).sum().backward()
    assert [set(of_one) for of_one in seen] == [{size} for size in sizes]


def test_outputs_of_a_balanced_subset_are_those_of_the_drawn_samples():
    model = network(3)
    handle = sd.apply(model, sd.Uniform(0.5), gate="subset", balance=True, scale="training")
    x = torch.randn(6, 4)
    out = model(x)
    h = x
    for unit, keep in zip(model, handle.gates, strict=True):
        assert int(keep.sum()) == 3
        h = h + 2 * keep[:, None] * unit.branch(h)
    torch.testing.assert_close(out, h)


@pytest.mark.parametrize("balance", [np.True_, 1])
def test_a_setting_is_saved_as_a_plain_value(balance) -> None:
    assert sd.apply(network(), balance=balance).state_dict()["balance"] is True


def test_what_cannot_be_balanced_says_what_would_be_right():
    with pytest.raises(
        sd.errors.ApplyError, match=r'multiple_of=8 needs gate="subset" and balance=True'
    ):
        sd.apply(network(), gate="subset", multiple_of=8)
    with pytest.raises(sd.errors.ApplyError, match=r"multiple_of=0: give a number of samples"):
        sd.apply(network(), gate="subset", balance=True, multiple_of=0)


@pytest.mark.parametrize(
    ("gate", "options", "samples", "share"),
    [
        ("subset", {"balance": True}, 2, 0.5),
        ("sample", {"balance": True}, 4, 0.75),
        ("subset", {"min_samples": 2}, 2, 1.0),
    ],
)
def test_a_rounded_share_is_divided_by_or_warned_of(gate, options, samples, share) -> None:
    def mean(scale: str) -> float:
        model, x = nn.Sequential(sd.Residual(nn.Linear(3, 3))), torch.ones(samples, 3)
        sd.apply(model, [0.7], gate=gate, scale=scale, **options)
        seen = torch.stack([model.train()(x) for _ in range(400)]).mean((0, 1)) - x[0]
        return (seen / model[0].branch(x[0])).mean().item()

    assert mean("training") == pytest.approx(1, abs=0.1)
    said = f"runs on {100 * share:.0f} % of the samples.*p_l = 0.7"
    with pytest.warns(UserWarning, match=said) as warned:
        assert mean("inference") == pytest.approx(share, abs=0.05)
    assert len(warned) == 1


def test_under_a_schedule_rounding_is_warned_of_when_it_begins() -> None:
    model = network(1)
    sd.apply(model, [0.6], schedule=sd.Late(2), gate="subset", balance=True)
    for _ in range(2):
        model(torch.ones(4, 4))
    with pytest.warns(UserWarning, match="runs on 50 % of the samples"):
        model(torch.ones(4, 4))


@pytest.mark.parametrize("options", [{}, {"multiple_of": 4}, {"min_samples": 2}], ids=str)
@pytest.mark.parametrize(("parts", "here"), [(2, None), (4, (0, 16)), (4, (8, 16))])
def test_a_share_is_that_of_the_parts_that_are_balanced(options, parts, here) -> None:
    model, survival = network(5), [0.9, 0.7, 0.5, 0.3, 0.1]
    handle = sd.apply(model, survival, gate="subset", balance=True, scale="training", **options)
    for unit in model:
        nn.init.zeros_(unit.branch.weight)
        nn.init.ones_(unit.branch.bias)
    handle.balanced_parts, handle.rank_samples = parts, here
    with torch.no_grad():
        for _ in range(5):  # in each step as many samples are open, so no mean is needed
            assert model(torch.zeros(8, 4)).mean().item() == pytest.approx(5, abs=1e-5)
