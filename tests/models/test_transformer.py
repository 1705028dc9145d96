import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.models import VisionTransformer
from stochastic_depth.models.transformer import HEADS, WIDTH, Attention, positions


@pytest.mark.parametrize(("size", "channels", "classes"), [(16, 3, 10), (8, 1, 7)])
def test_images_of_any_even_size_become_logits(size, channels, classes):
    model = VisionTransformer(2, classes, channels)
    assert model(torch.randn(2, channels, size, size)).shape == (2, classes)


def test_each_block_is_two_units_that_start_as_their_shortcut():
    model = VisionTransformer(3)
    assert len([m for m in model.modules() if isinstance(m, sd.Residual)]) == 6
    x = torch.randn(2, 4, WIDTH)
    torch.testing.assert_close(model.blocks(x), x, rtol=0, atol=0)
    assert not torch.equal(VisionTransformer(3, init="he").blocks(x), x)


def test_attention_is_a_softmax_of_products_for_each_head():
    torch.manual_seed(0)
    attention, x = Attention(), torch.randn(2, 5, WIDTH)
    found = attention(x)
    size = WIDTH // HEADS
    mixed = []
    for head in range(HEADS):
        q, k, v = (
            attention.qkv(x)[..., part * WIDTH + head * size :][..., :size] for part in range(3)
        )
        weights = (q @ k.transpose(1, 2) / size**0.5).softmax(-1)
        mixed.append(weights @ v)
    torch.testing.assert_close(found, attention.out(torch.cat(mixed, -1)))


def test_positions_tell_all_patches_apart_and_neighbours_are_alike():
    found = positions(4, 6)
    assert found.shape == (24, WIDTH)
    apart = torch.cdist(found, found)
    assert apart.fill_diagonal_(9).min() > 0.5
    assert apart[0, 1] < apart[0, 5]


def test_a_depth_below_one_is_an_error():
    with pytest.raises(sd.errors.ConfigError, match="depth=0: a vision transformer"):
        VisionTransformer(0)


def test_skipped_units_run_nothing():
    model = VisionTransformer(2)
    handle = sd.apply(model, sd.Uniform(0.5))
    ran = []
    for number, unit in enumerate(model.blocks):
        unit.branch.register_forward_hook(lambda *_, number=number: ran.append(number))
    with handle.forced([True, False, False, True]):
        model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert ran == [0, 3]
