from pathlib import Path

import pytest
import train_loop
import user_loop
from processes import run_checks

LOOPS = {"user_loop": user_loop.CHECKS, "train_loop": train_loop.CHECKS}
RANKS = {"one": 1, "two": 2, "four": 4}
Failures = dict[str, str]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Failures]:
    """Of each loop and stage; what one stage leaves in its loop's folder, the next one finds."""
    outcome = {}
    for loop, stages in LOOPS.items():
        script, folder = Path(__file__).with_name(f"{loop}.py"), tmp_path_factory.mktemp(loop)
        for stage in stages:
            outcome[loop, stage] = run_checks(script, RANKS[stage], folder, stage)
    return outcome


@pytest.mark.parametrize(
    ("loop", "stage", "check"),
    [
        (loop, stage, check.__name__)
        for loop, stages in LOOPS.items()
        for stage, checks in stages.items()
        for check in checks
    ],
)
def test_on_ranks(
    loop: str, stage: str, check: str, failures: dict[tuple[str, str], Failures]
) -> None:
    assert not failures[loop, stage][check], failures[loop, stage][check]
