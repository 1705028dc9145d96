import itertools
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import stochastic_depth as sd
from stochastic_depth.draw import (
    balanced_blocks,
    draw,
    expected_share,
    open_shares,
    subset_size,
)
from stochastic_depth.gates import (
    Gate,
    evaluation_gates,
    training_gates,
)
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
        "from stochastic_depth.draw import draw\n"
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


def test_a_block_that_does_not_run_yet_is_opened_for_no_sample() -> None:
    gates = draw(0, 0, (0.0, 0.5), batch=8, min_samples=2)
    assert not gates[0].any()
    assert gates[1].sum() >= 2


def balanced_joint(survival: tuple[float, ...]) -> torch.Tensor:
    """P(i and j open) of `balanced_blocks` over all orders, exactly: float64 [L, L].

    In an order in which the set A comes before i, and A, i and B before j, both are open for the
    starts at which each of their intervals, modulo 1, has a point. Sums over all A and B, with the
    share of orders that have them there.
    """
    blocks = len(survival)
    p = [Fraction(x) for x in survival]
    joint = torch.zeros(blocks, blocks, dtype=torch.float64)
    for i, j in itertools.permutations(range(blocks), 2):
        others = [b for b in range(blocks) if b not in (i, j)]
        total = 0.0
        for where in itertools.product((0, 1, 2), repeat=len(others)):
            before = [b for b, w in zip(others, where, strict=True) if w == 0]
            between = [b for b, w in zip(others, where, strict=True) if w == 1]
            after = len(others) - len(before) - len(between)
            share = (
                math.factorial(len(before)) * math.factorial(len(between)) * math.factorial(after)
            ) / math.factorial(blocks)
            first = sum((p[b] for b in before), Fraction(0))
            second = first + p[i] + sum((p[b] for b in between), Fraction(0))
            total += share * float(overlap(first, p[i], second, p[j]))
        joint[i, j] += total
        joint[j, i] += total
    return joint


def overlap(a: Fraction, length_a: Fraction, b: Fraction, length_b: Fraction) -> Fraction:
    """How much [a, a + length_a) and [b, b + length_b) have in common modulo 1."""
    apart = (b - a) % 1
    return max(Fraction(0), min(length_a, apart + length_b) - apart) + max(
        Fraction(0), min(length_a, apart - 1 + length_b)
    )


def all_gates(survival: tuple[float, ...]) -> list[tuple[float, torch.Tensor]]:
    """Every set of gates of `balanced_blocks` with its probability, by running all orders.

    The gates change only where a start passes the end of a block: one start between any two of
    these stands for all of them.
    """
    found = []
    orders = list(itertools.permutations(range(len(survival))))
    for order in orders:
        ends = itertools.accumulate(Fraction(survival[block]) for block in order)
        starts = sorted({Fraction(0), Fraction(1), *(end % 1 for end in ends)})
        for low, high in itertools.pairwise(starts):
            gates = balanced_blocks(survival, order, float((low + high) / 2))
            found.append((float(high - low) / len(orders), gates.double()))
    return found


def test_each_third_of_a_deep_network_has_its_share_in_every_step() -> None:
    survival = survival_probabilities(sd.LinearDecay(0.5), 54)
    p = torch.tensor(survival, dtype=torch.float64)
    gates = torch.stack([draw(0, step, survival, balance=True) for step in range(4000)]).double()
    for first in (0, 18, 36):
        counts, sum_of_p = gates[:, first : first + 18].sum(1), float(p[first : first + 18].sum())
        assert counts.min() > sum_of_p - 1
        assert counts.max() < sum_of_p + 1
    deviation = (p * (1 - p) / 4000).sqrt()
    assert ((gates.mean(0) - p).abs() < 4.5 * deviation).all()
    # Two blocks depend on each other as little as in a network of 18 blocks.
    joint = gates.T @ gates / 4000 - p[:, None] * p
    assert joint.fill_diagonal_(0).abs().max() < 0.25 / 17 + 5 * (0.25 / 4000) ** 0.5


SMALL = [
    (0.5, 0.5),
    (0.1, 0.1, 0.9, 0.9),
    (0.3, 1.0, 0.7, 0.25),
    (0.05, 0.5, 0.35, 0.6, 0.99),
    (0.875, 0.75, 0.625, 0.5, 0.2, 0.05),
    survival_probabilities(sd.LinearDecay(0.5), 6),
]


@pytest.mark.parametrize("survival", SMALL)
def test_balanced_gates_have_the_exact_probabilities_and_a_constant_number(survival) -> None:
    opened = torch.zeros(len(survival), dtype=torch.float64)
    joint = torch.zeros(len(survival), len(survival), dtype=torch.float64)
    depth = math.fsum(survival)
    for chance, gates in all_gates(survival):
        if chance > 1e-9:
            assert math.floor(depth + 1e-9) <= int(gates.sum()) <= math.ceil(depth - 1e-9)
        opened += chance * gates
        joint += chance * gates[:, None] * gates
    assert opened.tolist() == pytest.approx(list(survival), abs=1e-9)
    exact = balanced_joint(survival)
    assert (joint - joint.diag().diag()).tolist() == [
        pytest.approx(row, abs=1e-9) for row in exact.tolist()
    ]


@pytest.mark.parametrize(
    "survival",
    [
        survival_probabilities(sd.LinearDecay(0.5), 8),
        survival_probabilities(sd.LinearDecay(0.2), 8),
        survival_probabilities(sd.Uniform(0.5), 8),
    ],
)
def test_two_balanced_blocks_are_tied_hardly_more_than_a_constant_number_needs(survival) -> None:
    # The variances of the number open and of a random choice of as many leave, on the average over
    # pairs, this much covariance: what no design of constant size can avoid.
    joint, p = balanced_joint(survival), torch.tensor(survival, dtype=torch.float64)
    pairs = ~torch.eye(len(p), dtype=torch.bool)
    covariance = (joint - p[:, None] * p)[pairs]
    of_the_number = math.fsum(survival) % 1 * (1 - math.fsum(survival) % 1)
    needed = (of_the_number - (p * (1 - p)).sum()) / pairs.sum()
    assert covariance.mean().item() == pytest.approx(needed.item(), abs=1e-12)
    spread = (p * (1 - p)).sqrt()
    correlation = covariance / (spread[:, None] * spread)[pairs]
    assert correlation.abs().max().item() < 2.0 / (len(p) - 1)


def test_twelve_equal_blocks_balanced_are_a_random_choice_of_as_many() -> None:
    for count in (3, 6, 9):
        survival = (count / 12,) * 12
        steps = torch.stack([draw(0, step, survival, balance=True) for step in range(STEPS)])
        assert (steps.sum(1) == count).all()
        pair = count * (count - 1) / (12 * 11)
        for one, other in ((0, 1), (3, 9), (10, 11)):
            both = int((steps[:, one] & steps[:, other]).sum())
            assert stats.binomtest(both, STEPS, pair).pvalue > ALPHA


@settings(deadline=None)
@given(
    survival=st.lists(st.floats(0, 1), min_size=1, max_size=80).map(tuple),
    step=st.integers(0, 10**9),
)
def test_balanced_gates_are_always_of_the_expected_depth(survival, step: int) -> None:
    gates = draw(0, step, survival, balance=True)
    depth = math.fsum(survival)
    assert math.floor(depth + 1e-9) <= int(gates.sum()) <= math.ceil(depth - 1e-9)
    for p, is_open in zip(survival, gates.tolist(), strict=True):
        assert is_open or p < 1
        assert not is_open or p > 0


@pytest.mark.parametrize("blocks", [10, 30, 50, 600])
def test_a_sum_of_tenths_that_is_whole_is_always_met(blocks: int) -> None:
    for step in range(50):
        assert int(draw(0, step, (0.1,) * blocks, balance=True).sum()) == blocks // 10


def test_balanced_gates_drawn_follow_the_probabilities_and_steps_are_independent() -> None:
    steps = torch.stack([draw(5, step, SURVIVAL, balance=True) for step in range(STEPS)])
    for block, p in enumerate(SURVIVAL):
        assert stats.binomtest(int(steps[:, block].sum()), STEPS, p).pvalue > ALPHA
        assert independence(steps[:-1, block], steps[1:, block]) > ALPHA


def test_ranks_with_balanced_gates_of_their_own_are_equally_deep_and_not_the_same() -> None:
    differ = 0
    for step in range(300):
        ranks = [draw(0, step, SURVIVAL, balance=True, rank=rank) for rank in range(4)]
        assert len({int(gates.sum()) for gates in ranks}) == 1
        differ += not torch.equal(ranks[0], ranks[1])
    assert differ > 200
    for rank in (0, 3):
        steps = [draw(0, step, SURVIVAL, balance=True, rank=rank) for step in range(STEPS)]
        for opened, p in zip(torch.stack(steps).sum(0), SURVIVAL, strict=True):
            assert stats.binomtest(int(opened), STEPS, p).pvalue > ALPHA


@settings(deadline=None)
@given(
    p=st.floats(0, 1),
    samples=st.integers(1, 300),
    least=st.integers(0, 5),
    multiple=st.sampled_from([1, 2, 8]),
)
def test_a_balanced_subset_is_of_the_rounded_size_and_never_empty(p, samples, least, multiple):
    size = subset_size(p, samples, least, multiple)
    assert int(draw(0, 3, (p,), samples, least, balance=True, multiple_of=multiple).sum()) == size
    if p == 0:
        assert size == 0
    elif p == 1:
        assert size == samples
    else:
        assert min(samples, max(1, least)) <= size <= samples
        assert size % multiple == 0 or size in (samples, least)
        near = min(max(p * samples, multiple, least), samples)
        assert abs(size - near) <= multiple / 2 or size == samples


def test_every_sample_is_in_a_balanced_subset_equally_often_and_none_with_its_neighbour() -> None:
    steps = torch.stack([draw(2, step, (0.3, 0.6), 10, balance=True) for step in range(STEPS)])
    assert (steps.sum(2) == torch.tensor([3, 6])).all()
    for block, size in enumerate((3, 6)):
        for sample in range(10):
            opened = int(steps[:, block, sample].sum())
            assert stats.binomtest(opened, STEPS, size / 10).pvalue > ALPHA
        both = int((steps[:, block, 4] & steps[:, block, 5]).sum())
        assert stats.binomtest(both, STEPS, size * (size - 1) / 90).pvalue > ALPHA
    assert independence(steps[:, 0, 0], steps[:, 1, 0]) > ALPHA


def test_each_process_has_balanced_subsets_of_its_part_of_a_mini_batch() -> None:
    coins = draw(0, 0, (0.25, 0.5, 0.01), 22, balance=True, parts=3)
    ends = [0, 7, 14, 22]
    for first, end in itertools.pairwise(ends):
        sizes = [subset_size(p, end - first) for p in (0.25, 0.5, 0.01)]
        assert coins[:, first:end].sum(1).tolist() == sizes


@pytest.mark.parametrize("kind", ["sample", "subset"])
def test_what_is_divided_by_is_the_share_that_a_balanced_gate_opens(kind) -> None:
    coins = draw(0, 0, (0.3, 0.0), 8, balance=True)
    gates = training_gates(coins, (0.3, 0.0), kind, "training", open_shares(coins).tolist())
    assert gates[0].factor == pytest.approx(8 / 2)
    assert not coins[1].any()


@pytest.mark.parametrize("kind", ["batch", "sample", "subset"])
def test_the_factor_is_not_rounded_to_the_precision_of_the_branch(kind) -> None:
    x = torch.linspace(1, 2, 129)[:128].repeat(4).bfloat16()[:, None]
    coins = torch.ones((1,) if kind == "batch" else (1, len(x)), dtype=torch.bool)
    (gate,) = training_gates(coins, (0.9,), kind, "training")
    ratio = (gate.scale(x).double() / x.double()).mean().item()
    assert ratio * 0.9 == pytest.approx(1, abs=2e-4)  # 1 / 0.9 in bfloat16 is off by 1.6e-3


@pytest.mark.parametrize("least", [0, 1, 2, 4, 9])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.7, 1.0])
def test_the_expected_share_with_a_smallest_subset_is_that_of_all_patterns(p, least) -> None:
    patterns = itertools.product([0, 1], repeat=5)
    expected = sum(
        math.prod(p if coin else 1 - p for coin in coins) * max(sum(coins), min(least, 5) * (p > 0))
        for coins in patterns
    )
    assert expected_share(p, 5, least) == pytest.approx(expected / 5, rel=1e-12)


@pytest.mark.parametrize(("p", "samples", "least"), [(0.5, 2048, 300), (0.1, 3000, 290)])
def test_the_expected_share_of_a_large_batch_is_that_of_exact_arithmetic(p, samples, least) -> None:
    exact = Fraction(p)
    missing = sum(
        (least - k) * math.comb(samples, k) * exact**k * (1 - exact) ** (samples - k)
        for k in range(least)
    )
    assert expected_share(p, samples, least) == pytest.approx(
        float(exact + missing / samples), rel=1e-12
    )


@pytest.mark.parametrize("options", [{}, {"min_samples": 2}, {"balance": True}])
def test_training_is_unbiased_where_it_divides_by_what_is_open(options) -> None:
    model, x = torch.nn.Sequential(sd.Residual(torch.nn.Linear(3, 3))), torch.ones(4, 3)
    sd.apply(model, [0.2], gate="subset", scale="training", **options)
    with torch.no_grad():
        mean = torch.stack([model.train()(x) for _ in range(STEPS)]).mean((0, 1))
        expected = model.eval()(x)[0]
    torch.testing.assert_close(mean, expected, atol=0.06, rtol=0)
