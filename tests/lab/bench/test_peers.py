import sys

import pytest
import torch

from stochastic_depth.errors import MissingExtraError
from stochastic_depth.lab.bench.peers import (
    CONSTANT,
    OURS,
    PEERS,
    SUBSET,
    THEIRS,
    TIMM,
    TUTORIAL,
    peers,
)
from stochastic_depth.lab.bench.workload import step_memory
from stochastic_depth.train.runtime import Runtime

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

CPU = Runtime("cpu", "float32", 1)
MODULES = {"timm": "timm", "torchvision": "torchvision", "x-transformers": "x_transformers"}


def small(name, rate):
    """The steps of a network's peers on two images of 32x32, or two texts of 32 tokens."""
    for package in PEERS[name].libraries:
        pytest.importorskip(MODULES[package], reason=f"needs {package}")
    return peers(name, 20, rate, 2, 32, CPU)


@pytest.mark.parametrize("name", PEERS)
def test_all_start_from_the_same_weights(name):
    steps, _ = small(name, 0.0)
    assert len(steps) > 1
    losses = torch.stack([step() for step in steps.values()])
    torch.testing.assert_close(losses, losses[:1].expand_as(losses), rtol=1e-5, atol=1e-6)


def test_the_peers_of_each_network():
    assert {CONSTANT, TUTORIAL, OURS, "timm DropPath"} < small("cifar-resnet", 0.5)[0].keys()
    assert {CONSTANT, TIMM, OURS, SUBSET} == small("vit-small", 0.5)[0].keys()


def test_a_mask_keeps_all_and_ours_keeps_less():
    steps, missing = small("vit-small", 0.9)
    assert not missing
    kept = {name: step_memory(step, "cpu", steps=2) for name, step in steps.items()}
    assert kept[TIMM] >= kept[CONSTANT]
    assert kept[OURS] < kept[CONSTANT]
    assert kept[SUBSET] < kept[CONSTANT]


def test_x_transformers_leaves_layers_out_and_so_do_we():
    steps, missing = small("x-transformer", 0.9)
    assert not missing
    assert steps.keys() == {CONSTANT, THEIRS, OURS}
    for skipping in (THEIRS, OURS):
        assert step_memory(steps[skipping], "cpu") < step_memory(steps[CONSTANT], "cpu")


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.layers", None)
    steps, missing = peers("cifar-resnet", 8, 0.5, 4, 16, CPU)
    assert "timm DropPath" not in steps
    assert "pip install timm" in missing["timm DropPath"]


@pytest.mark.parametrize(
    ("name", "module"), [("convnext-tiny", "timm"), ("x-transformer", "x_transformers")]
)
def test_without_its_library_there_is_no_network(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=f"pip install {module}"):
        peers(name, 20, 0.5, 2, 32, CPU)


def test_every_step_of_ours_has_the_expected_number_of_open_blocks():
    step = small("cifar-resnet", 0.5)[0][OURS]
    counts = set()
    for _ in range(6):
        step()
        counts.add(int(step.handle.gates.sum()))
    assert counts <= {6, 7}  # 6.5 of 9 blocks at linear decay to 0.5
