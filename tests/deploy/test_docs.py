"""The how-to's code runs as it stands."""

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "how-to" / "deploy.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=["fold", "truncate"])
@pytest.mark.usefixtures("one_thread")
def test_a_block_runs(block):
    exec(compile(block, "deploy.md", "exec"), {})
