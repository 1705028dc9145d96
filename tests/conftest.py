import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist

from stochastic_depth.extras import import_torchvision

pytest.register_assert_rewrite("support")  # its assertions say as much as those of tests
import_torchvision()  # which libraries that tests use import

SOAK = bool(os.environ.get("STOCHASTIC_DEPTH_SOAK"))
hypothesis.settings.register_profile("soak", max_examples=1_000, deadline=None)
if SOAK:
    hypothesis.settings.load_profile("soak")

COUNTS: Counter[str] = Counter()

LONG = (
    "distributed/test_train.py",
    "distributed/test_loops_on_ranks.py",
    "train/test_kill.py",
    "cli/test_sweep.py",
    "cli/test_bench.py",
    "data/test_hostile.py",
    "lab/sweep/test_worker.py",
    "block_program/test_forms.py",
    "block_program/test_library.py",
    "lab/bench/test_depth.py",
    "test_examples.py",
    "test_notebook.py",
)
"""Files that take longest, which several processes begin with: none is left alone with one."""


def pytest_configure() -> None:
    """Let Ctrl-C reach tests and the processes they start: in the background it may be ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On small tensors a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone: DDP waits for parameters in it all the same."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's, which nothing may change."""
    path = tmp_path / "mine"
    path.write_bytes(b"mine")
    return path


@pytest.fixture(scope="session")
def soak() -> bool:
    """Whether the long form is wanted: `make soak`."""
    return SOAK


@pytest.fixture(scope="session")
def counts() -> Counter[str]:
    """What was tried and survived, shown at the end."""
    return COUNTS


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes
        session.config.workeroutput["counts"] = dict(COUNTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    COUNTS.update(node.workeroutput["counts"])


def pytest_terminal_summary(terminalreporter) -> None:
    if COUNTS:
        terminalreporter.section("tried and survived")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{count:>12,}  {name}")
