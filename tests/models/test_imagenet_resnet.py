import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.models import ImageNetResNet


@pytest.mark.parametrize(
    ("depth", "parameters", "blocks"),
    [(50, 25_557_032, 16), (101, 44_549_160, 33), (152, 60_192_808, 50)],
)
def test_parameters_and_blocks_are_the_published_ones(
    depth: int, parameters: int, blocks: int
) -> None:
    model = ImageNetResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(sd.apply(model).survival) == blocks


@pytest.mark.parametrize("depth", [18, 49, 110])
def test_another_depth_is_an_error(depth: int) -> None:
    with pytest.raises(sd.errors.ConfigError, match=rf"depth={depth}: .*50, 101 or 152"):
        ImageNetResNet(depth)


def test_it_computes_what_torchvisions_resnet_computes() -> None:
    torchvision = pytest.importorskip("torchvision")
    theirs, ours = torchvision.models.resnet50(num_classes=10), ImageNetResNet(50, classes=10)
    state = theirs.state_dict()
    for name, value in state.items():
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
    assert [v.shape for v in state.values()] == [v.shape for v in ours.state_dict().values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    x = torch.randn(2, 3, 32, 64)
    for training in (False, True):
        with torch.no_grad():
            expected = theirs.train(training)(x)
            torch.testing.assert_close(ours.train(training)(x), expected, rtol=1e-4, atol=1e-4)


def test_blocks_are_numbered_over_the_whole_network_in_order_of_execution() -> None:
    model = ImageNetResNet(50, classes=3)
    handle = sd.apply(model)
    order, shapes = [], []

    def note(block: torch.nn.Module, _: tuple, out: torch.Tensor) -> None:
        order.append(block)
        shapes.append(tuple(out.shape[1:3]))

    for block in model.blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert order == [model.get_submodule(block.name) for block in handle.blocks]
    assert shapes == [
        *[(256, 16)] * 3,
        *[(512, 8)] * 4,
        *[(1024, 4)] * 6,
        *[(2048, 2)] * 3,
    ]


def test_the_projection_of_a_closed_block_still_learns() -> None:
    model = ImageNetResNet(50, classes=3, init="he")
    handle = sd.apply(model, skipped="freeze")
    with handle.forced([False] * 16):
        model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert not handle.gates.any()
    projecting = [block for block in model.blocks if block.shortcut is not None]
    assert [list(model.blocks).index(block) for block in projecting] == [0, 3, 7, 13]
    for block in model.blocks:
        assert all(p.grad is None for p in block.branch.parameters())
    for block in projecting:
        assert all(p.grad is not None and p.grad.any() for p in block.shortcut.parameters())
