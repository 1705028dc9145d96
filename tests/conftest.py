import os
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch

# torchvision's wheels bring compiled operators only for CUDA builds of torch; with a CPU build
# it imports once the two operators it refers to are declared.
if torch.version.cuda is None:
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

SOAK = bool(os.environ.get("STOCHASTIC_DEPTH_SOAK"))
hypothesis.settings.register_profile("soak", max_examples=1_000, deadline=None)
if SOAK:
    hypothesis.settings.load_profile("soak")

COUNTS: Counter[str] = Counter()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On small tensors a second thread is only waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def soak() -> bool:
    """Whether the long form is wanted: `make soak`."""
    return SOAK


@pytest.fixture(scope="session")
def counts() -> Counter[str]:
    """What was tried and survived, told at the end."""
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
