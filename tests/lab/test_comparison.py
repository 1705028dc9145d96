import json
import shutil
import statistics
from dataclasses import replace

import numpy as np
import pytest

from stochastic_depth.errors import RunError
from stochastic_depth.lab.comparison import (
    compare_runs,
    train_pairs,
    twins,
    write_comparison,
)
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.recipes import RECIPES
from stochastic_depth.train import DataConfig, ModelConfig, OptimizerConfig, open_run
from support.data_sets import write_pictures
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


def test_another_seed_on_other_pictures_is_refused_before_it_is_trained(tmp_path):
    data = DataConfig("folder", tmp_path / "mine", size=16, workers=0)
    model, optimizer = ModelConfig(depth=8), OptimizerConfig(batch=8)
    config = replace(SMALL, data=data, model=model, optimizer=optimizer, epochs=1)
    for part, seed in (("of cats", 0), ("of birds", 1)):
        write_pictures(tmp_path / "mine", seed)
        train_pairs(config, [seed], tmp_path / part, unseen(), lambda: None)
    began, now = (
        open_run(tmp_path / part / f"constant-seed{seed}").fingerprint[:12]
        for part, seed in (("of cats", 0), ("of birds", 1))
    )
    with pytest.raises(RunError, match=f"fingerprint {began}, this data has {now}: give the data"):
        train_pairs(config, [0, 1], tmp_path / "of cats", unseen(), lambda: None)
    assert not (tmp_path / "of cats" / "constant-seed1").exists()
    for kind in ("constant", "stochastic"):
        shutil.copytree(
            tmp_path / "of birds" / f"{kind}-seed1", tmp_path / "of cats" / f"{kind}-seed1"
        )
    with pytest.raises(RunError, match=f"seed1 began on data with fingerprint {now}, .*{began}"):
        train_pairs(config, [0, 1, 2], tmp_path / "of cats", unseen(), lambda: None)
    assert not (tmp_path / "of cats" / "constant-seed2").exists()


def test_a_seed_whose_journal_is_empty_is_not_left_out(runs, tmp_path):
    folder = runs["constant"][0].path.parent
    shutil.copytree(folder, tmp_path / "pairs")
    (tmp_path / "pairs" / "stochastic-seed4" / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(RunError, match=r"stochastic-seed4 is finished, and .* lines are missing"):
        train_pairs(SMALL, [3, 4], tmp_path / "pairs", unseen(), lambda: None)
