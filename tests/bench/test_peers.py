import pytest
import torch

from stochastic_depth.bench.peers import CONSTANT, OURS, TUTORIAL, peers
from stochastic_depth.bench.workload import Workload
from stochastic_depth.train.execution import Execution

pytestmark = pytest.mark.usefixtures("one_thread")

WORKLOAD = Workload(4, 16, 3, Execution("cpu", "float32", 1))


def test_all_start_from_the_same_weights():
    pytest.importorskip("timm", reason="needs timm")
    steps, missing = peers(20, 1.0, WORKLOAD)
    assert not missing
    assert {CONSTANT, TUTORIAL, OURS, "timm DropPath"} < steps.keys()
    losses = torch.stack([step() for step in steps.values()])
    torch.testing.assert_close(losses, losses[:1].expand_as(losses), rtol=1e-5, atol=1e-6)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm.layers", None)
    steps, missing = peers(8, 0.5, WORKLOAD)
    assert "timm DropPath" not in steps
    assert "pip install timm" in missing["timm DropPath"]
