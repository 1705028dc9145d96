import socket
from pathlib import Path

import numpy as np
import pytest

REAL = Path(__file__).parents[2] / "../shared/data"


@pytest.fixture
def real_cifar10_root() -> Path:
    root = REAL / "cifar10"
    if not root.is_dir():
        pytest.skip("the real CIFAR-10 is not here")
    return root.resolve()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def pictures():
    """`pictures(n)`: random uint8 [n, 32, 32, 3], always the same."""
    return lambda n, seed=0: np.random.default_rng(seed).integers(
        0, 256, (n, 32, 32, 3), dtype=np.uint8
    )
