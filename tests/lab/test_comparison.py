import json
import statistics
from dataclasses import replace

import numpy as np
import pytest

from stochastic_depth.lab.comparison import (
    compare_runs,
    train_pairs,
    twins,
    write_comparison,
)
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import ModelConfig
from support.runs import trained_by, unseen

SMALL = replace(RECIPES["digits"](), model=ModelConfig(depth=14), epochs=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return train_pairs(SMALL, [3, 4], tmp_path_factory.mktemp("pairs"), unseen(), lambda: None)


def test_spread_is_mean_and_sample_deviation():
    values = [1.0, 4.0, 2.5]
    assert Spread.of(values).mean == pytest.approx(np.mean(values))
    assert Spread.of(values).deviation == pytest.approx(np.std(values, ddof=1))
    assert Spread.of([2.0]) == Spread(2.0, None)


def test_the_twins_differ_in_the_survival_rule_alone(runs):
    assert [run.config.seed for run in runs["constant"]] == [3, 4]
    for constant, stochastic in zip(runs["constant"], runs["stochastic"], strict=True):
        assert constant.config.survival.rule == "constant"
        assert replace(constant.config, survival=stochastic.config.survival) == stochastic.config


def test_the_twins_are_trained_by_one_engine():
    subset = replace(SMALL, survival=replace(SMALL.survival, gate="subset"))
    assert [config.engine for config in twins(subset)] == ["eager", "eager"]
    assert [config.engine for config in twins(SMALL)] == ["auto", "auto"]
    assert [config.survival.rule for config in twins(subset)] == ["constant", "linear"]


def test_a_saving_between_different_engines_is_not_written(runs, tmp_path):
    write_comparison(tmp_path, trained_by(compare_runs(runs), "compiled"), runs)
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["comparison"]["saving_measured"] is None


def test_figures_are_those_of_the_journals(runs, tmp_path):
    write_comparison(tmp_path, compare_runs(runs), runs)
    found = json.loads((tmp_path / "comparison.json").read_text())["comparison"]
    last = [run.records()[-1].test_error for run in runs["stochastic"]]
    assert found["stochastic"]["test_error_last"]["mean"] == pytest.approx(np.mean(last))
    assert found["blocks"] == 6
    assert found["expected_active_blocks"] == pytest.approx((3 * 6 - 1) / 4)
    assert found["constant"]["active_blocks"] == {"mean": 6.0, "deviation": 0.0}
    medians = {
        kind: statistics.median(r.seconds for run in runs[kind] for r in run.records())
        for kind in runs
    }
    saving = 1 - medians["stochastic"] / medians["constant"]
    assert found["saving_measured"] == pytest.approx(saving)
    assert 0.15 < found["saving_expected"] < 0.3
