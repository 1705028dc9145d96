import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import stochastic_depth as sd
from stochastic_depth.gates import Gate, draw, evaluation_gates, open_shares, training_gates
from stochastic_depth.survival import survival_probabilities

SURVIVAL = survival_probabilities(sd.LinearDecay(0.5), 10)
STEPS = 4000
ALPHA = 1e-4
"""Significance of one test among the hundred or so here; the seeds are fixed."""


@pytest.fixture(scope="module")
def coins() -> torch.Tensor:
    """bool [STEPS, 10]."""
    return torch.stack([draw(0, step, SURVIVAL) for step in range(STEPS)])


def independence(a: torch.Tensor, b: torch.Tensor) -> float:
    """The p-value of the chi-square test that two series of coins are independent."""
    table = [[int(((a == i) & (b == j)).sum()) for j in (0, 1)] for i in (0, 1)]
    return stats.chi2_contingency(table).pvalue


def test_each_block_is_open_as_often_as_its_survival_probability(coins: torch.Tensor) -> None:
    for block, p in enumerate(SURVIVAL):
        opened = int(coins[:, block].sum())
        assert stats.binomtest(opened, STEPS, p).pvalue > ALPHA, f"block {block + 1}"


def test_blocks_are_independent_of_each_other(coins: torch.Tensor) -> None:
    for one, other in itertools.combinations(range(len(SURVIVAL)), 2):
        assert independence(coins[:, one], coins[:, other]) > ALPHA, (one, other)


@pytest.mark.parametrize("lag", [1, 2, 10])
def test_steps_are_independent_of_each_other(coins: torch.Tensor, lag: int) -> None:
    for one, other in itertools.product((0, 4, 9), repeat=2):
        assert independence(coins[:-lag, one], coins[lag:, other]) > ALPHA, (one, other)


def test_seeds_are_independent_of_each_other(coins: torch.Tensor) -> None:
    others = torch.stack([draw(1, step, SURVIVAL) for step in range(STEPS)])
    for block in range(len(SURVIVAL)):
        assert independence(coins[:, block], others[:, block]) > ALPHA


def test_the_number_of_active_blocks_has_mean_and_variance_of_independent_coins(
    coins: torch.Tensor,
) -> None:
    active = coins.sum(1).double()
    mean, variance = sum(SURVIVAL), sum(p * (1 - p) for p in SURVIVAL)
    assert active.mean().item() == pytest.approx(mean, abs=4 * (variance / STEPS) ** 0.5)
    assert active.var().item() == pytest.approx(variance, rel=4 * (2 / STEPS) ** 0.5)


def test_a_block_that_always_survives_is_always_open() -> None:
    assert all(draw(0, step, (1.0, 1.0)).all() for step in range(500))


def test_the_gates_depend_on_seed_and_step_alone() -> None:
    torch.manual_seed(0)
    gates = draw(3, 4, SURVIVAL)
    torch.manual_seed(1)
    assert torch.equal(draw(3, 4, SURVIVAL), gates)


def test_a_fresh_process_draws_the_same_gates() -> None:
    program = (
        "from stochastic_depth.gates import draw\n"
        f"print([[draw(7, step, {SURVIVAL!r}).int().tolist() for step in range(50)],"
        f" draw(7, 0, {SURVIVAL!r}, batch=9).int().tolist()])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    here = [draw(7, step, SURVIVAL).int().tolist() for step in range(50)]
    assert answer.stdout.decode().strip() == str([here, draw(7, 0, SURVIVAL, 9).int().tolist()])


def test_pinned_gates_hold_in_every_version() -> None:
    def shown(seed: int, step: int) -> str:
        return "".join(str(int(b)) for b in draw(seed, step, (0.5,) * 24))

    assert [shown(0, 0), shown(0, 1), shown(1, 0)] == [
        "111110111111111100111101",
        "001011011100101001011010",
        "101100110001010100111111",
    ]


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)), min_size=1, max_size=30),
    step=st.integers(0, 10**9),
    batch=st.none() | st.integers(1, 4),
)
def test_a_larger_probability_only_opens_more(
    pairs: list[tuple[float, float]], step: int, batch: int | None
) -> None:
    fewer = draw(0, step, tuple(min(pair) for pair in pairs), batch)
    more = draw(0, step, tuple(max(pair) for pair in pairs), batch)
    assert bool((fewer <= more).all())


def test_gates_for_single_samples_follow_the_probabilities_and_are_independent() -> None:
    coins = draw(0, 0, SURVIVAL, batch=STEPS)
    assert coins.shape == (len(SURVIVAL), STEPS)
    assert coins.dtype == torch.bool
    for row, p in zip(coins, SURVIVAL, strict=True):
        assert stats.binomtest(int(row.sum()), STEPS, p).pvalue > ALPHA
        assert independence(row[:-1], row[1:]) > ALPHA
    for one, other in itertools.combinations(coins, 2):
        assert independence(one, other) > ALPHA


def test_a_batch_gate_is_open_or_closed_for_all_samples() -> None:
    gates = training_gates(torch.tensor([True, False]), (0.8, 0.5), "batch", "inference")
    assert gates == [Gate(open=True), Gate(open=False)]


def test_a_sample_gate_keeps_the_drawn_samples_and_is_always_open() -> None:
    coins = torch.tensor([[True, False, True], [False, False, False]])
    gates = training_gates(coins, (0.8, 0.5), "sample", "inference")
    assert [gate.open for gate in gates] == [True, True]
    assert [gate.keep.tolist() for gate in gates if gate.keep is not None] == coins.tolist()


def test_a_subset_gate_lists_the_drawn_samples_and_is_closed_without_any() -> None:
    coins = torch.tensor([[True, False, True], [False, False, False]])
    gates = training_gates(coins, (0.8, 0.5), "subset", "inference")
    assert [gate.open for gate in gates] == [True, False]
    assert [g.samples.tolist() for g in gates if g.samples is not None] == [[0, 2], []]


@pytest.mark.parametrize("kind", ["batch", "sample", "subset"])
@pytest.mark.parametrize(
    ("scale", "in_training", "in_evaluation"),
    [("inference", [None, None], [0.8, 0.5]), ("training", [1.25, 2.0], [None, None])],
)
def test_the_factor_makes_up_for_skipping_once(kind, scale, in_training, in_evaluation) -> None:
    survival = (0.8, 0.5)
    coins = draw(0, 0, survival, None if kind == "batch" else 4)
    assert [gate.factor for gate in training_gates(coins, survival, kind, scale)] == in_training
    assert [gate.factor for gate in evaluation_gates(survival, scale)] == in_evaluation
    assert all(gate.open for gate in evaluation_gates(survival, scale))


def test_open_shares_are_counted_by_block() -> None:
    coins = torch.tensor([[True, True, False, False], [True, True, True, True]])
    assert open_shares(coins).tolist() == [0.5, 1.0]
    assert open_shares(coins[:, 0]).tolist() == [1.0, 1.0]
    assert open_shares(torch.empty(0, dtype=torch.bool)).tolist() == []


def test_a_subset_is_of_at_least_so_many_samples_and_only_where_the_coins_say_fewer() -> None:
    survival = (0.05, 0.5, 0.95)
    for step in range(200):
        coins = draw(1, step, survival, batch=6)
        for least in (1, 2, 9):
            more = draw(1, step, survival, batch=6, min_samples=least)
            assert (more >= coins).all()
            counts = coins.sum(1).clamp(min=min(least, 6))
            assert torch.equal(more.sum(1), counts)
