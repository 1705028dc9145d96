"""Work that the kernels share between threads: all of it is done, whoever comes."""

import os
import shutil
import subprocess

import pytest

from stochastic_depth.block_program import library

pytestmark = pytest.mark.skipif(
    library.why_unavailable() is not None, reason=f"needs {library.why_unavailable()}"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    made = tmp_path_factory.mktemp("threads") / "threads"
    source = os.path.join(os.path.dirname(__file__), "threads.cpp")
    compiler = os.environ.get("CXX", "g++")
    flags = ["-O2", "-std=c++17", "-pthread", f"-I{library.SOURCE.parent}"]
    flags.append(f"-DMOST_THREADS={library.MOST_THREADS}")
    subprocess.run([compiler, *flags, "-o", str(made), source], check=True)
    return made


@pytest.mark.parametrize("cores", ["all", "one"])
def test_every_part_is_computed_once(program, cores):
    command = [str(program)]
    if cores == "one":  # helpers come late, or in the middle of what the caller does
        if shutil.which("taskset") is None:
            pytest.skip("needs taskset")
        command = ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    counts = dict(line.split() for line in outcome.stdout.splitlines())
    assert set(counts.values()) == {"0"}
    assert list(counts) == [
        *(f"{threads}-threads" for threads in (1, 2, 5, library.MOST_THREADS)),
        *("fewer-again", "two-callers", "forked", "after-fork"),
    ]
