import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stochastic_depth as sd
from stochastic_depth.survival import probabilities_of, survival_probabilities

probabilities = st.floats(min_value=0, max_value=1, exclude_min=True)


@settings(deadline=None)
@given(final=probabilities, blocks=st.integers(1, 600))
def test_linear_decay_is_the_papers_closed_form(final: float, blocks: int) -> None:
    survival = survival_probabilities(sd.LinearDecay(final), blocks)
    exact = [1 - Fraction(block, blocks) * (1 - Fraction(final)) for block in range(1, blocks + 1)]
    assert survival == pytest.approx([float(p) for p in exact], rel=1e-12, abs=1e-15)


@settings(deadline=None)
@given(final=probabilities, blocks=st.integers(1, 2000))
def test_linear_decay_reaches_its_final_probability_exactly(final: float, blocks: int) -> None:
    assert survival_probabilities(sd.LinearDecay(final), blocks)[-1] == final


@settings(deadline=None)
@given(final=st.floats(min_value=0.001, max_value=0.999), blocks=st.integers(2, 600))
def test_linear_decay_can_skip_the_first_block_too_and_only_decreases(
    final: float, blocks: int
) -> None:
    survival = survival_probabilities(sd.LinearDecay(final), blocks)
    assert survival[0] < 1
    assert all(before > after for before, after in pairwise(survival))


def test_linear_decay_of_four_blocks() -> None:
    assert survival_probabilities(sd.LinearDecay(), 4) == (0.875, 0.75, 0.625, 0.5)


@settings(deadline=None)
@given(blocks=st.integers(1, 2000))
def test_expected_depth_under_linear_decay_to_a_half(blocks: int) -> None:
    expected = math.fsum(survival_probabilities(sd.LinearDecay(0.5), blocks))
    assert expected == pytest.approx((3 * blocks - 1) / 4, rel=1e-12)


def test_expected_depth_of_the_papers_network_is_a_little_over_40_of_54() -> None:
    assert math.fsum(survival_probabilities(sd.LinearDecay(0.5), 54)) == pytest.approx(40.25)


def test_uniform_gives_every_block_the_same_probability() -> None:
    assert survival_probabilities(sd.Uniform(0.8), 5) == (0.8,) * 5


def test_any_function_of_block_and_blocks_is_a_rule() -> None:
    asked = []

    def rule(block: int, blocks: int) -> float:
        asked.append((block, blocks))
        return 1 / block

    assert survival_probabilities(rule, 3) == (1.0, 1 / 2, 1 / 3)
    assert asked == [(1, 3), (2, 3), (3, 3)]


def test_a_rule_may_return_any_kind_of_number() -> None:
    assert survival_probabilities(lambda block, blocks: torch.tensor(0.25), 2) == (0.25, 0.25)
    assert survival_probabilities(lambda block, blocks: 1, 1) == (1.0,)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0000001, math.inf, -math.inf, math.nan])
def test_a_probability_outside_of_0_to_1_names_rule_block_and_value(p: float) -> None:
    class Third:
        def __call__(self, block: int, blocks: int) -> float:
            return p if block == 3 else 0.5

        def __repr__(self) -> str:
            return "Third()"

    with pytest.raises(sd.errors.SurvivalError) as error:
        survival_probabilities(Third(), 7)
    assert f"Third() gives block 3 of 7 the survival probability {p}" in str(error.value)
    assert "above 0 and at most 1" in str(error.value)


def test_a_probability_outside_of_0_to_1_in_a_list_is_said_of_the_list() -> None:
    with pytest.raises(sd.errors.SurvivalError, match=r"^survival gives block 2 of 3 the .* 0\.0;"):
        probabilities_of([1.0, 0.0, 0.5], ["a", "b", "c"])


@pytest.mark.parametrize("answer", [None, "often", [0.5], 1j])
def test_a_rule_that_gives_no_number_names_rule_and_block(answer: object) -> None:
    def odd(block: int, blocks: int) -> object:
        return answer

    with pytest.raises(sd.errors.SurvivalError, match=r"odd.* gives no number for block 1"):
        survival_probabilities(odd, 2)


@pytest.mark.parametrize("rule", [0.5, "linear", (0.9, 0.5)])
def test_what_is_no_rule_is_told_what_one_is(rule: object) -> None:
    with pytest.raises(
        sd.errors.SurvivalError, match=r"is not a rule: give sd\.LinearDecay"
    ) as error:
        survival_probabilities(rule, 2)
    assert repr(rule) in str(error.value)


def test_rules_are_values() -> None:
    assert sd.LinearDecay(0.5) == sd.LinearDecay()
    assert len({sd.Uniform(0.5), sd.Uniform(0.5), sd.Uniform(0.6)}) == 2


NAMES = ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2", "head"]


def test_probabilities_are_given_by_rule_by_number_or_by_name() -> None:
    assert probabilities_of(sd.Uniform(0.5), NAMES).at(0) == (0.5,) * 6
    given = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    assert probabilities_of(given, NAMES).at(0) == given
    assert probabilities_of({"decoder.1": 0.25, "head": 0.5}, NAMES).at(0) == (
        1,
        1,
        1,
        0.25,
        1,
        0.5,
    )


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_probabilities_may_be_an_array(kind) -> None:
    given = [0.875, 0.75, 0.625, 0.5]
    model = torch.nn.Sequential(*(sd.Residual(torch.nn.Linear(2, 2)) for _ in given))
    assert sd.apply(model, kind(given)).survival == tuple(given)


def test_a_rule_counts_blocks_anew_in_each_stack() -> None:
    p = probabilities_of(sd.LinearDecay(0.4), NAMES, stacks=["encoder", "decoder"]).at(0)
    assert p == pytest.approx((0.7, 0.4, 0.8, 0.6, 0.4, 0.4))


def test_one_stack_is_given_by_its_name() -> None:
    rule = sd.LinearDecay(0.4)
    assert probabilities_of(rule, NAMES, "decoder").at(0) == probabilities_of(
        rule, NAMES, ["decoder"]
    ).at(0)


@pytest.mark.parametrize(
    ("survival", "stacks", "message"),
    [
        ([0.5] * 5, (), r"gives 5 probabilities, the model has 6 blocks"),
        (
            {"decoder.7": 0.5},
            (),
            r"'decoder\.7', but there is no such block; similar .*'decoder\.1'",
        ),
        ([0.5, 0, 1, 1, 1, 1], (), r"block 2 of 6 the survival probability 0"),
        ({"head": 2.0}, (), r"block 6 of 6 the survival probability 2"),
        (sd.Uniform(0.5), ["body"], r"no block belongs to 'body'"),
        ([0.5] * 6, ["decoder"], r"stacks=\['decoder'\] needs a rule"),
        ("linear", (), r"survival='linear' is not a rule"),
    ],
)
def test_what_does_not_fit_the_blocks_is_named(survival, stacks, message) -> None:
    with pytest.raises(sd.errors.SurvivalError, match=message):
        probabilities_of(survival, NAMES, stacks)
