import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.models import DenseNet

PLAIN = {"bottleneck": False, "compression": 1.0}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("depth", "growth", "settings", "published"),
    [
        (40, 12, PLAIN, 1.0e6),
        (100, 12, PLAIN, 7.0e6),
        (100, 24, PLAIN, 27.2e6),
        (100, 12, {}, 0.8e6),
        (250, 24, {}, 15.3e6),
        (190, 40, {}, 25.6e6),
    ],
)
def test_parameters_are_the_published_ones(
    depth: int, growth: int, settings: dict, published: float
) -> None:
    model = DenseNet(depth, growth, **settings)
    assert parameters(model) == pytest.approx(published, abs=0.05e6)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth


def test_parameters_of_densenet_bc_100_12_exactly() -> None:
    assert parameters(DenseNet(100, 12)) == 769_162


@pytest.mark.parametrize(
    ("depth", "bottleneck", "remedy"),
    [
        (-2, False, r"without bottlenecks has 3n \+ 4 layers: 22, 52, 97"),
        (4, False, r"3n \+ 4"),
        (41, False, r"3n \+ 4"),
        (4, True, r"6n \+ 4"),
        (43, True, r"with bottlenecks has 6n \+ 4 layers: 40, 100, 190"),
        (110, True, r"6n \+ 4"),
    ],
)
def test_a_depth_that_does_not_fit_is_an_error(depth: int, bottleneck: bool, remedy: str) -> None:
    with pytest.raises(sd.errors.ConfigError, match=rf"depth={depth}: .*{remedy}"):
        DenseNet(depth, 12, bottleneck)


@pytest.mark.parametrize("compression", [0.0, -1.0, 1.5])
def test_a_compression_outside_of_0_to_1_is_an_error(compression: float) -> None:
    with pytest.raises(sd.errors.ConfigError, match=rf"compression={compression}"):
        DenseNet(40, 12, compression=compression)


def plain_densenet(x: Tensor, model: nn.Module, layers: int, bottleneck: bool) -> Tensor:
    """The network written out, its weights taken one after the other."""
    convolutions = (m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
    norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))

    def bn_relu(h: Tensor) -> Tensor:
        norm = next(norms)
        gain = norm.weight / (norm.running_var + 1e-5).sqrt()
        bias = norm.bias - norm.running_mean * gain
        return (h * gain.view(-1, 1, 1) + bias.view(-1, 1, 1)).clamp(min=0)

    features = [F.conv2d(x, next(convolutions), padding=1)]
    for block in range(3):
        for _ in range(layers):
            h = torch.cat(features, 1)
            if bottleneck:
                h = F.conv2d(bn_relu(h), next(convolutions))
            features.append(F.conv2d(bn_relu(h), next(convolutions), padding=1))
        h = torch.cat(features, 1)
        if block < 2:
            features = [F.avg_pool2d(F.conv2d(bn_relu(h), next(convolutions)), 2)]
    pooled = bn_relu(h).mean((2, 3))
    assert not list(convolutions)
    assert not list(norms)
    return pooled @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("bottleneck", [False, True])
def test_every_layer_reads_all_layers_before_it(bottleneck: bool) -> None:
    settings = {} if bottleneck else PLAIN
    model = DenseNet(22, 4, classes=7, channels=2, **settings).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 2, 16, 16, dtype=torch.float64)
    out = model.eval()(x)
    assert out.shape == (3, 7)
    expected = plain_densenet(x, model, layers=3 if bottleneck else 6, bottleneck=bottleneck)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_the_first_convolution_has_16_channels_or_twice_the_growth() -> None:
    assert DenseNet(22, 12, **PLAIN).features[0].out_channels == 16
    assert DenseNet(22, 12).features[0].out_channels == 24


def test_a_densenet_trains() -> None:
    model = DenseNet(22, 4)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_nothing_can_be_skipped_in_a_densenet() -> None:
    with pytest.raises(sd.errors.ApplyError, match="no residual block found in DenseNet"):
        sd.apply(DenseNet(22, 4))
