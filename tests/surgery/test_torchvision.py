"""Models as they are published, built without weights: `sd.apply` verifies each on its example."""

import pytest
import torch

import stochastic_depth as sd

models = pytest.importorskip("torchvision.models", reason="needs torchvision")

pytestmark = pytest.mark.usefixtures("one_thread")


def vision_transformer():
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32
    )


BLOCKS = {
    "resnet18": 8,
    "resnet50": 16,
    "mobilenet_v2": 10,
    "mobilenet_v3_small": 6,
    "efficientnet_b0": 9,
    "regnet_x_400mf": 22,
    "convnext_tiny": 18,
    "swin_t": 12,
    "vision_transformer": 4,
}


def build(name):
    return vision_transformer() if name == "vision_transformer" else models.get_model(name)


def images(name, count=2):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32 if name == "vision_transformer" else 64, 64, generator=rng)[
        ..., : 32 if name == "vision_transformer" else 64
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_found_and_verified(name):
    model = build(name)
    keys = list(model.state_dict())
    expected = model.eval()(images(name))
    handle = sd.apply(model, sd.Uniform(1.0), example=images(name))
    assert len(handle.survival) == BLOCKS[name]
    assert list(model.state_dict()) == keys
    assert torch.equal(model.eval()(images(name)), expected)


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "convnext_tiny"])
def test_a_training_step_skips_what_is_closed(name):
    model = build(name)
    handle = sd.apply(model, sd.Uniform(0.5), example=images(name), skipped="freeze", seed=1)
    model.train()(images(name)).sum().backward()
    gates = handle.gates.tolist()
    assert 0 < sum(gates) < len(gates)
    for block, is_open in zip(handle.blocks, gates, strict=True):
        touched = {model.get_parameter(p).grad is not None for p in block.parameters}
        assert touched == {is_open}, block.name


def test_the_drop_path_that_swin_shares_between_two_additions_is_silenced():
    model = build("swin_t")
    rates = [m.p for m in model.modules() if isinstance(m, models.swin_transformer.StochasticDepth)]
    assert max(rates) > 0
    sd.apply(model, example=images("swin_t"))
    drop_paths = [
        m for m in model.modules() if isinstance(m, models.swin_transformer.StochasticDepth)
    ]
    assert {m.p for m in drop_paths} == {0.0}
    sd.remove(model)
    assert [m.p for m in drop_paths] == rates


def test_concatenating_networks_are_said_to_have_no_residual_block():
    with pytest.raises(sd.errors.ApplyError, match="no residual block found in DenseNet"):
        sd.apply(models.densenet121(), example=images("densenet121"))
