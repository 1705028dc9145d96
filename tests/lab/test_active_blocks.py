import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import stochastic_depth as sd
from stochastic_depth.lab.active_blocks import ActiveBlocks, active_blocks, active_distribution
from stochastic_depth.lab.recorded import read_run
from stochastic_depth.recipes import RECIPES
from stochastic_depth.survival import survival_probabilities
from stochastic_depth.train import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    SurvivalConfig,
    begin,
    fit,
)
from stochastic_depth.train.schedule_config import ScheduleConfig
from support.runs import SILENT, edit_description

PROBABILITIES = st.lists(st.floats(0.01, 1), min_size=1, max_size=7)


@settings(deadline=None)
@given(PROBABILITIES)
def test_the_distribution_is_that_of_all_patterns_together(survival):
    expected = np.zeros(len(survival) + 1)
    for pattern in itertools.product((0, 1), repeat=len(survival)):
        chance = math.prod(p if b else 1 - p for p, b in zip(survival, pattern, strict=True))
        expected[sum(pattern)] += chance
    found = active_distribution(torch.tensor(survival, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("final", [0.2, 0.5, 0.95])
def test_the_distribution_of_110_blocks_is_scipys(final):
    survival = survival_probabilities(sd.LinearDecay(final), 110)
    found = active_distribution(torch.tensor([survival] * 2, dtype=torch.float64))
    expected = stats.poisson_binom(survival).pmf(np.arange(111))
    np.testing.assert_allclose(found.numpy(), [expected, expected], rtol=1e-9, atol=1e-14)


def test_mean_and_deviation_are_those_of_the_counts_and_of_the_coins():
    survival = survival_probabilities(sd.LinearDecay(0.5), 20)
    counts = np.random.default_rng(0).multinomial(500, stats.poisson_binom(survival).pmf(range(21)))
    expected = active_distribution(torch.tensor(survival, dtype=torch.float64)).tolist()
    drawn, exact = ActiveBlocks(counts.tolist(), expected).moments()
    values = np.repeat(np.arange(21), counts)
    assert drawn == pytest.approx((values.mean(), values.std()))
    variance = sum(p * (1 - p) for p in survival)
    assert exact == pytest.approx((math.fsum(survival), variance**0.5))


def test_the_test_of_fit_is_pearsons_and_tells_other_coins_apart():
    expected = stats.binom(8, 0.5).pmf(range(9)).tolist()
    counts = [3, 6, 21, 46, 50, 44, 22, 7, 1]
    pooled = [3 + 6, 21, 46, 50, 44, 22, 7 + 1]
    chances = np.array([sum(expected[:2]), *expected[2:7], sum(expected[7:])])
    found = ActiveBlocks(counts, expected).p_value()
    assert found == pytest.approx(stats.chisquare(pooled, 200 * chances).pvalue)
    assert ActiveBlocks(counts[::-1], stats.binom(8, 0.6).pmf(range(9)).tolist()).p_value() < 1e-6
    assert ActiveBlocks([0, 0, 60], [0.0, 0.0, 1.0]).p_value() == 1
    # Six sixths of 5 are summed to 4.999999999999999.
    drawn, chances = [2, 1, 0, 3, 1, 2, 21], [5 / 30 / 6] * 6 + [25 / 30]
    found = ActiveBlocks(drawn, chances).p_value()
    assert found == pytest.approx(stats.chisquare([9, 21], [5, 25]).pvalue)


def run_of(path, silent, survival, epochs=3, batch=128, train=None):
    config = dataclasses.replace(
        RECIPES["digits"](),
        data=DataConfig(train=train),
        model=ModelConfig(depth=8),
        survival=survival,
        optimizer=OptimizerConfig(batch=batch),
        epochs=epochs,
    )
    run, images = begin(config, path)
    list(fit(run, images, silent))
    return run


@pytest.mark.usefixtures("one_thread")
def test_under_a_schedule_the_distribution_is_the_mean_over_the_steps(tmp_path):
    schedule = ScheduleConfig("warmup", until=0.5)
    run = run_of(tmp_path / "run", SILENT, SurvivalConfig(final=0.2, schedule=schedule))
    final = np.array([11 / 15, 7 / 15, 3 / 15])
    rows = [
        stats.poisson_binom(1 - min(1, step / 15) * (1 - final)).pmf(range(4)) for step in range(30)
    ]
    found = active_blocks([read_run(run.path)])
    np.testing.assert_allclose(found.expected, np.mean(rows, 0), rtol=1e-9, atol=1e-12)
    assert sum(found.counts) == 30
    assert found.p_value() > 1e-3


def rounded(p, samples):
    """The share that a balanced gate opens, of all samples or of the parts of processes."""
    return max(1, round(p * samples)) / samples


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("gate", "processes"), [("subset", 1), ("sample", 1), ("subset", 2)])
def test_balanced_gates_for_samples_open_rounded_shares(tmp_path, gate, processes):
    """Of 9 of 104 images each, and 5 in the last mini-batch; p_l is 0.77, 0.53 and 0.3."""
    survival = SurvivalConfig(final=0.3, gate=gate, balance=True)
    run = run_of(tmp_path / "run", SILENT, survival, epochs=8, batch=9, train=104)
    records = run.records()
    if processes == 2:
        edit_description(run.path, lambda described: described["machine"].update(processes=2))
    found = active_blocks([read_run(run.path)])
    assert sum(found.counts) == 8 * 104
    parts = {1: [9] * 11 + [5], 2: [4, 5] * 11 + [2, 3]}[processes]
    rates = [[rounded(1 - 0.7 * block / 3, samples) for block in (1, 2, 3)] for samples in parts]
    chances = [stats.poisson_binom(rate).pmf(range(4)) for rate in rates]
    expected = np.average(chances, axis=0, weights=parts)
    np.testing.assert_allclose(found.expected, expected, rtol=1e-9, atol=1e-12)
    if processes == 1:
        assert found.p_value() > 1e-3
        mean = np.average(np.sum(rates, 1), weights=parts)
        assert [r.expected_active_blocks for r in records] == pytest.approx([mean] * 8)


def test_the_steps_of_several_runs_are_counted_together(tmp_path):
    survival = SurvivalConfig(final=0.2, schedule=ScheduleConfig("warmup", until=0.5))
    long = read_run(run_of(tmp_path / "run", SILENT, survival).path)
    short = dataclasses.replace(long, records=long.records[:1])
    alone, of_short = active_blocks([long]), active_blocks([short])
    found = active_blocks([short, long])
    assert found.counts == [a + b for a, b in zip(alone.counts, of_short.counts, strict=True)]
    assert found.expected == pytest.approx(
        [(3 * a + b) / 4 for a, b in zip(alone.expected, of_short.expected, strict=True)]
    )


def test_of_many_steps_some_are_enough(tmp_path, monkeypatch):
    survival = SurvivalConfig(final=0.2, schedule=ScheduleConfig("warmup", until=0.9))
    run = read_run(run_of(tmp_path / "run", SILENT, survival).path)
    every = active_blocks([run]).expected
    monkeypatch.setattr("stochastic_depth.lab.active_blocks.STEPS", 10)
    found = active_blocks([run]).expected
    assert found != every
    assert found == pytest.approx(every, abs=0.002)


def test_constant_depth_has_all_blocks_active(pairs):
    found = active_blocks([read_run(pairs["constant"][0].path)])
    assert found.counts == [0] * 6 + [sum(found.counts)]
    assert found.expected == [0.0] * 6 + [1.0]
