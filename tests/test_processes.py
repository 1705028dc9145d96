import subprocess
import sys

import pytest

from stochastic_depth.processes import cores, peak_resident, resident

CHILD = "from stochastic_depth.processes import peak_resident; print(peak_resident())"
PARENT = f"""
import subprocess, sys
large = bytearray(b"x") * 400_000_000
print(subprocess.run([sys.executable, "-c", {CHILD!r}], check=True, capture_output=True,
                     text=True).stdout)
"""


def test_memory_is_counted_in_bytes():
    assert 2**24 < resident() <= peak_resident() < 2**40


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: the peak of one process alone")
def test_the_peak_of_the_process_that_started_this_one_is_not_counted():
    answer = subprocess.run(
        [sys.executable, "-c", PARENT], check=True, capture_output=True, text=True
    )
    assert int(answer.stdout) < 200_000_000


def test_there_is_a_core():
    assert cores() >= 1
