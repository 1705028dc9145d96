import random

import numpy as np
import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet, DenseNet, ImageNetResNet, VisionTransformer
from stochastic_depth.models.initialisation import initialise

BUILDERS = [
    pytest.param(lambda **settings: CifarResNet(20, **settings), id="CifarResNet"),
    pytest.param(lambda **settings: ImageNetResNet(50, classes=7, **settings), id="ImageNetResNet"),
    pytest.param(lambda **settings: DenseNet(22, 4, **settings), id="DenseNet"),
]
RESIDUAL = BUILDERS[:2]
TRANSFORMER = pytest.param(
    lambda **settings: VisionTransformer(1, init="he", **settings), id="VisionTransformer"
)


@pytest.mark.parametrize("build", BUILDERS)
def test_building_a_model_neither_uses_nor_changes_the_random_state(build) -> None:
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model = build()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    torch.manual_seed(2)
    for one, other in zip(model.state_dict().values(), build().state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("build", [*BUILDERS, TRANSFORMER])
def test_the_weights_are_a_function_of_the_seed(build) -> None:
    one, same, other = (list(build(seed=seed).parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    drawn = [(a, c) for a, c in zip(one, other, strict=True) if a.ndim > 1]
    assert not any(torch.equal(a, c) for a, c in drawn)


@pytest.mark.parametrize("build", BUILDERS)
def test_every_weight_and_statistic_is_set_and_on_the_cpu(build) -> None:
    model = build()
    for tensor in model.state_dict().values():
        assert tensor.device.type == "cpu"
        assert tensor.isfinite().all()
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.running_mean.any()
            assert bool((module.running_var == 1).all())
            assert module.num_batches_tracked == 0


@pytest.mark.parametrize("build", BUILDERS)
def test_convolutions_have_the_variance_of_he(build) -> None:
    for module in build().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            variance = module.weight.var().item()
            tolerance = 5 * (2 / module.weight.numel()) ** 0.5
            assert variance == pytest.approx(2 / fan_out, rel=tolerance)


@pytest.mark.parametrize("build", RESIDUAL)
def test_zero_gain_starts_every_block_as_its_shortcut(build) -> None:
    model = build(init="zero-gain").eval()
    x = torch.randn(2, 3, 32, 32)
    out = model(x)
    h = model.stem(x)
    for block in model.blocks:
        h = (h if block.shortcut is None else block.shortcut(h)).clamp(min=0)
    torch.testing.assert_close(out, model.head(h.mean((2, 3))))
    with torch.no_grad():
        for block in model.blocks:
            for module in block.branch.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.normal_()
    assert torch.equal(model(x), out)


@pytest.mark.parametrize("build", RESIDUAL)
def test_he_starts_with_every_gain_1(build) -> None:
    for module in build(init="he").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


def test_the_two_initialisations_differ_in_the_last_gains_only() -> None:
    zero, he = CifarResNet(20, init="zero-gain"), CifarResNet(20, init="he")
    different = {
        name
        for (name, a), b in zip(zero.named_parameters(), he.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert different == {f"blocks.{block}.branch.4.weight" for block in range(9)}


def test_a_module_of_another_kind_is_not_left_with_random_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    initialise(model, "he", seed=0)
    assert not model[0].bias.any()
    assert model[1].weight.is_meta


def test_the_largest_network_is_built_and_applied() -> None:
    model = CifarResNet(1202)
    assert sd.apply(model).expected_depth == pytest.approx((3 * 600 - 1) / 4)
