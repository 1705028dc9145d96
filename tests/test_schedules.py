"""Drop rates over time: the named schedules, rules of the step, and what a model makes of them."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.survival import probabilities_of

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["a.0", "a.1", "b.0", "b.1"]


def network(blocks: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(blocks))).double()


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (sd.Warmup(4), {0: 0, 1: 0.25, 2: 0.5, 3: 0.75, 4: 1, 100: 1}),
        (sd.Early(4), {0: 1, 1: 0.75, 3: 0.25, 4: 0, 100: 0}),
        (sd.Early(4, "constant"), {0: 1, 3: 1, 4: 0, 100: 0}),
        (sd.Late(4), {0: 0, 3: 0, 4: 1, 100: 1}),
        (sd.Decreasing(2, 6), {0: 1, 2: 1, 3: 0.75, 5: 0.25, 6: 0, 100: 0}),
        (sd.Progressive(0.5), {0: 0, 1: 1 - math.exp(-0.5), 6: 1 - math.exp(-3)}),
        (sd.Steps({3: 0.5, 5: 1}), {0: 0, 2: 0, 3: 0.5, 4: 0.5, 5: 1, 100: 1}),
        (lambda step: (step % 2) / 2, {0: 0, 1: 0.5, 2: 0}),
    ],
)
def test_drop_rates_are_the_share_of_the_rules_that_the_schedule_gives(schedule, shares):
    over_time = probabilities_of(sd.LinearDecay(0.2), NAMES, schedule=schedule)
    for step, share in shares.items():
        rates = [share * 0.2 * block for block in (1, 2, 3, 4)]
        assert over_time.at(step) == pytest.approx([1 - rate for rate in rates], abs=1e-12)


def test_a_schedule_that_does_not_drop_is_exact_and_one_in_full_is_the_rule():
    over_time = probabilities_of(sd.Uniform(0.3), NAMES, schedule=sd.Warmup(7))
    assert over_time.at(0) == (1.0,) * 4
    assert over_time.at(7) == (0.3,) * 4


def test_a_rule_of_the_step_is_asked_for_every_block_and_step_and_in_each_stack():
    def rule(block: int, blocks: int, step: int) -> float:
        return block / blocks if step < 10 else 0.0

    over_time = probabilities_of(rule, NAMES, stacks=["a", "b"])
    assert over_time.at(0) == (0.5, 1.0, 0.5, 1.0)
    assert over_time.at(10) == (0.0,) * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.Warmup(0), r"until is a number of steps, 1 or more"),
        (lambda: sd.Early(1.5), r"until is a number of steps"),
        (lambda: sd.Early(3, "cubic"), r'"linear" or "constant"'),
        (lambda: sd.Decreasing(5, 5), r"until is a number of steps, 6 or more"),
        (lambda: sd.Progressive(0), "gamma must be a number above 0"),
        (lambda: sd.Steps({999.9: 0.5}), r"999.9.*give steps, integers from 0"),
        (lambda: sd.Steps({0: 1.5}), "a number from 0 to 1"),
        (lambda: sd.Steps({}), "give at least one step and its share"),
        (lambda: sd.Steps([(5, 0.1), (0, 1), (5, 0.2)]), "step 5 has two shares, give it one"),
        (lambda: probabilities_of(sd.Uniform(0.5), NAMES, schedule=lambda step: 2.0),
         r"gives step 0 the share 2\.0"),
        (lambda: probabilities_of(sd.Uniform(0.5), NAMES, schedule=0.3), "is not a schedule"),
        (lambda: probabilities_of(lambda block, blocks, step: 0.5, NAMES, schedule=sd.Late(1)),
         "is a rule of the step itself"),
        (lambda: probabilities_of(lambda block, blocks, step: 1.5, NAMES),
         r"gives block 1 of 4 .* 1\.5"),
        (lambda: probabilities_of(sd.Uniform(0.0), NAMES), "must be above 0"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_says_why(make, message):
    with pytest.raises(sd.errors.SurvivalError, match=message):
        make()


@pytest.mark.parametrize("scale", ["inference", "training"])
@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("balance", [False, True])
def test_a_block_that_does_not_run_yet_runs_neither_in_training_nor_in_evaluation(
    scale, gate, balance
):
    model = network()

    def grows(block: int, blocks: int, step: int) -> float:
        return float(block <= 2 + step // 3)

    handle = sd.apply(model, grows, scale=scale, gate=gate, balance=balance)
    called = [0] * 4
    for number, unit in enumerate(model):
        unit.branch.register_forward_hook(
            lambda *_, number=number: called.__setitem__(number, called[number] + 1)
        )
    x = torch.randn(3, 4, dtype=torch.float64)
    for step in range(7):
        there = min(4, 2 + step // 3)
        out = model.train()(x)
        expected = x
        for unit in list(model)[:there]:
            expected = expected + unit.branch(expected)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(model.eval()(x), expected)
        out.sum().backward()
        assert handle.survival == (1.0,) * there + (0.0,) * (4 - there)
    assert called[2] > 0
    model.train()
    handle.step = 0
    called[:] = [0] * 4
    model(x)
    model.eval()(x)
    assert called == [2, 2, 0, 0]


def test_a_schedule_is_part_of_the_state_and_of_what_is_printed():
    model = network()
    handle = sd.apply(model, sd.LinearDecay(0.5), schedule=sd.Early(6, "constant"))
    for _ in range(4):
        model(torch.randn(2, 4, dtype=torch.float64))
    state = json.loads(json.dumps(handle.state_dict()))
    assert state["schedule"] == {"name": "Early", "until": 6, "shape": "constant"}
    assert "schedule=Early" in repr(handle)
    other = sd.apply(network(), sd.LinearDecay(0.5), schedule=sd.Early(6, "constant"))
    other.load_state_dict(state)
    assert other.step == 4
    for schedule in (None, sd.Early(7, "constant"), sd.Warmup(6), sd.Steps({0: 1})):
        wrong = sd.apply(network(), sd.LinearDecay(0.5), schedule=schedule)
        with pytest.raises(sd.errors.StateError) as error:
            wrong.load_state_dict(state)
        assert "saved state has schedule=" in str(error.value)


def test_steps_are_plain_values_in_the_state():
    handle = sd.apply(network(), sd.LinearDecay(0.5), schedule=sd.Steps({4: 1, 2: 0.5}))
    state = handle.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state["schedule"] == {"name": "Steps", "shares": [[2, 0.5], [4, 1.0]]}


def test_a_model_with_a_schedule_can_be_copied():
    model = network()
    handle = sd.apply(model, sd.LinearDecay(0.5), schedule=sd.Warmup(4))
    x = torch.randn(2, 4, dtype=torch.float64)
    model(x)
    other = copy.deepcopy(model)
    for _ in range(5):
        model(x)
        other(x)
    assert sd.handle_of(other).survival == handle.survival
