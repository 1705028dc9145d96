import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet
from stochastic_depth.models.resnet import PoolAndPad


@pytest.mark.parametrize(
    ("depth", "parameters", "blocks"),
    [(20, 0.27e6, 9), (56, 0.85e6, 27), (110, 1.7e6, 54), (152, 2.4e6, 75), (1202, 19.4e6, 600)],
)
def test_parameters_and_blocks_are_the_published_ones(
    depth: int, parameters: float, blocks: int
) -> None:
    model = CifarResNet(depth)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == pytest.approx(parameters, rel=0.02)
    assert len([m for m in model.modules() if isinstance(m, sd.Residual)]) == blocks
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert all(
        block.shortcut is None or not [*block.shortcut.parameters()] for block in model.blocks
    )


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 109, 111])
def test_a_depth_that_is_not_6n_plus_2_is_an_error(depth: int) -> None:
    with pytest.raises(
        sd.errors.ConfigError, match=rf"depth={depth}: .*6n \+ 2 layers: 20, 32, 56, 110"
    ):
        CifarResNet(depth)


@pytest.mark.parametrize(("channels", "classes", "size"), [(3, 10, 32), (3, 100, 32), (1, 10, 8)])
def test_images_become_logits(channels: int, classes: int, size: int) -> None:
    model = CifarResNet(8, classes, channels)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    model(torch.randn(2, channels, size, size))
    assert shapes == [(16, size, size), (32, size // 2, size // 2), (64, size // 4, size // 4)]


def test_the_transition_shortcut_averages_and_appends_zeros() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).view(2, 3, 4, 6).square()
    out = PoolAndPad(added=2)(x)
    assert out.shape == (2, 5, 2, 3)
    for b in range(2):
        for c in range(5):
            for i in range(2):
                for j in range(3):
                    window = x[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] if c < 3 else None
                    expected = 0 if window is None else window.sum().item() / 4
                    assert out[b, c, i, j].item() == pytest.approx(expected)


def test_every_block_can_be_dropped_the_transitions_too() -> None:
    model = CifarResNet(20, init="he")
    handle = sd.apply(model)
    x = torch.randn(2, 3, 32, 32)
    with handle.forced([False] * 9):
        out = model(x)
    assert not handle.gates.any()
    stem = model.stem(x)
    pooled = nn.functional.avg_pool2d(stem, 4)
    features = nn.functional.pad(pooled.mean((2, 3)), (0, 48))
    torch.testing.assert_close(out, model.head(features))
    out.sum().backward()
    assert not any(p.grad.any() for p in model.blocks.parameters())


def test_a_training_step_learns_in_every_open_block() -> None:
    model = CifarResNet(20, init="he")
    handle = sd.apply(model, sd.Uniform(0.5), skipped="freeze")
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    for is_open, block in zip(handle.gates.tolist(), model.blocks, strict=True):
        assert all((p.grad is not None) == is_open for p in block.parameters())
    assert not handle.gates.all()
