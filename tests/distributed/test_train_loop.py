from pathlib import Path

import pytest
from processes import run_checks
from train_loop import CHECKS

SCRIPT = Path(__file__).with_name("train_loop.py")
RANKS = {"one": 1, "two": 2}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("ranks")
    return {stage: run_checks(SCRIPT, ranks, folder, stage) for stage, ranks in RANKS.items()}


@pytest.mark.parametrize(
    ("stage", "check"),
    [(stage, check.__name__) for stage, checks in CHECKS.items() for check in checks],
)
def test_on_ranks(stage: str, check: str, results: dict[str, dict[str, str]]) -> None:
    assert not results[stage][check], results[stage][check]
