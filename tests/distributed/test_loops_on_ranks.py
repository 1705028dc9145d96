"""What `user_loop` and `train_loop` say holds on every rank, each in one group of processes."""

import pytest

from support import train_loop, user_loop
from support.ranks import run_checks

LOOPS = {"user_loop": user_loop, "train_loop": train_loop}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[str, str], str]]:
    """Of each loop; what one stage leaves in the folder, the next one finds."""
    return {loop: run_checks(loop, tmp_path_factory.mktemp(loop)) for loop in LOOPS}


@pytest.mark.parametrize(
    ("loop", "stage", "check"),
    [
        (loop, stage, check.__name__)
        for loop, module in LOOPS.items()
        for stage, checks in module.CHECKS.items()
        for check in checks
    ],
)
def test_on_ranks(loop, stage, check, failures) -> None:
    assert failures[loop][stage, check] == ""
