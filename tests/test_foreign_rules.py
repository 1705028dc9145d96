"""The rules of other libraries, against the libraries' own numbers."""

import math

import numpy as np
import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.foreign_rules import SHAPES
from stochastic_depth.survival import probabilities_of, survival_probabilities

pytestmark = pytest.mark.usefixtures("one_thread")


def drop_rates(name, rate, blocks):
    return [1 - p for p in survival_probabilities(sd.survival_rule(name, rate), blocks)]


@pytest.mark.parametrize("depths", [[1], [12], [2, 2, 6, 2]])
def test_timm(depths):
    drop = pytest.importorskip("timm.layers.drop", reason="needs timm")
    per_block = drop.calculate_drop_path_rates(0.3, sum(depths))
    assert drop_rates("timm", 0.3, sum(depths)) == pytest.approx(per_block, rel=1e-6)
    stages = drop.calculate_drop_path_rates(0.3, depths, stagewise=True)
    flat = [rate for stage in stages for rate in stage]
    assert drop_rates("timm-stagewise", 0.3, sum(depths)) == pytest.approx(flat, rel=1e-6)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "resnet26"])
def test_the_rates_in_a_model_of_timms(name):
    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.create_model(name, drop_path_rate=0.2)
    example = torch.randn(2, 3, 224 if name.startswith("vit") else 64, 224)[..., :64]
    example = torch.randn(2, 3, 224, 224) if name.startswith("vit") else example
    named = sd.plan(model, example, sd.survival_rule("timm", 0.2))
    own = sd.plan(model, example, "own")
    assert [b.survival for b in named.blocks] == pytest.approx(
        [b.survival for b in own.blocks], rel=1e-6
    )
    assert own.blocks[-1].survival == pytest.approx(0.8)


def test_torchvision():
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")

    def rates(model):
        return [m.p for m in model.modules() if type(m).__name__ == "StochasticDepth"]

    efficientnet = rates(models.efficientnet_b0(stochastic_depth_prob=0.3))
    assert drop_rates("torchvision", 0.3, 16) == pytest.approx(efficientnet, rel=1e-6)
    convnext = rates(models.convnext_tiny(stochastic_depth_prob=0.3))
    assert drop_rates("torchvision-last", 0.3, 18) == pytest.approx(convnext, rel=1e-6)
    swin = rates(models.swin_t())
    assert drop_rates("torchvision-last", 0.2, 12) == pytest.approx(swin, rel=1e-6)


def test_own_rates_are_exact_where_blocks_that_are_not_residual_are_counted_too():
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    model = models.efficientnet_b0(stochastic_depth_prob=0.3)
    handle = sd.apply(model, "own", example=torch.randn(2, 3, 64, 64))
    paths = dict(model.named_modules())
    silent = [paths[f"{block.name}.stochastic_depth"].p for block in handle.blocks]
    assert silent == [0.0] * 9
    sd.remove(model)
    own = [paths[f"{block.name}.stochastic_depth"].p for block in handle.blocks]
    assert list(handle.survival) == pytest.approx([1 - rate for rate in own])


def test_transformers_skip_with_one_rate():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=1, ffn_dim=8,
        word_embed_proj_dim=8, layerdrop=0.3, use_cache=False,
    )  # fmt: skip
    model = transformers.OPTModel(config).train()
    ran = [0, 0, 0]
    for n, layer in enumerate(model.decoder.layers):
        layer.register_forward_hook(lambda *_, n=n: ran.__setitem__(n, ran[n] + 1))
    torch.manual_seed(0)
    ids = torch.arange(4)[None]
    with torch.no_grad():
        for _ in range(600):
            model(ids)
    expected = survival_probabilities(sd.survival_rule("transformers", 0.3), 3)
    deviation = (0.3 * 0.7 / 600) ** 0.5
    assert [count / 600 for count in ran] == pytest.approx(list(expected), abs=4 * deviation)


# get_scale of torchtune 0.6.1 times prob_max, for 5 layers:
# [0.3 * get_scale(ScaleType(name), 5 - 1, n) for n in range(5)]
TORCHTUNE = {
    "torchtune": [0.3, 0.3, 0.3, 0.3, 0.3],
    "torchtune-linear": [0.0, 0.075, 0.15, 0.225, 0.3],
    "torchtune-exp": [0.0, 0.05676213, 0.12426407, 0.20453785, 0.3],
    "torchtune-log": [0.0, 0.12920297, 0.20478186, 0.25840593, 0.3],
    "torchtune-sin": [0.0, 0.11480503, 0.21213203, 0.27716386, 0.3],
    "torchtune-sigmoid": [0.00200786, 0.02275745, 0.15, 0.27724255, 0.3],
}


@pytest.mark.parametrize("name", TORCHTUNE)
def test_torchtune(name):
    assert drop_rates(name, 0.3, 5) == pytest.approx(TORCHTUNE[name], abs=1e-8)
    assert drop_rates(name, 0.3, 1) == pytest.approx([0.3])


def test_fairseq_has_one_rate():
    # LayerDropModuleList of fairseq 0.12.2 runs a layer if uniform_() > p.
    assert drop_rates("fairseq", 0.3, 4) == pytest.approx([0.3] * 4)


@pytest.mark.parametrize("step", [0, 1, 100, 3000, 10**6])
def test_progressive_layer_dropping_of_deepspeed(step):
    # ProgressiveLayerDrop.update_state of DeepSpeed 0.14: theta(t) = (1 - theta) exp(-gamma t) +
    # theta; its BERT keeps layer l of L with 1 - l / L (1 - theta(t)).
    theta, gamma, layers = 0.4, 0.002, 6
    now = (1 - theta) * math.exp(-gamma * step) + theta
    over_time = probabilities_of(
        sd.survival_rule("deepspeed", 1 - theta),
        [str(n) for n in range(layers)],
        schedule=sd.Progressive(gamma),
    )
    expected = [1 - layer / layers * (1 - now) for layer in range(1, layers + 1)]
    assert over_time.at(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distribution", ["composer", "composer-uniform"])
@pytest.mark.parametrize("step", [0, 7, 39, 40, 200])
def test_the_drop_warmup_of_composer(distribution, step):
    # StochasticDepth.apply of Composer 0.12: the rate grows over drop_warmup of all steps, and
    # _update_drop_rate gives block n of N (n + 1) / N of it, or all of it.
    rate = 0.2 * min(1, step / (0.2 * 200))
    over_time = probabilities_of(
        sd.survival_rule(distribution, 0.2),
        ["0", "1", "2", "3"],
        schedule=sd.Warmup(40),
    )
    shape = [1, 1, 1, 1] if distribution == "composer-uniform" else [0.25, 0.5, 0.75, 1]
    assert over_time.at(step) == pytest.approx([1 - rate * each for each in shape])


def test_early_and_late_stochastic_depth():
    # drop_scheduler of Liu et al. 2023: np.linspace(rate, 0, cutoff) and then 0; rate until the
    # cutoff and then 0; or 0 until the cutoff and then rate.
    cutoff, steps, rate = 8, 20, 0.3
    none, full = np.zeros(steps - cutoff), np.full(steps - cutoff, rate)
    expected = {
        sd.Early(cutoff - 1): [*np.linspace(rate, 0, cutoff), *none],
        sd.Early(cutoff, "constant"): [*np.full(cutoff, rate), *none],
        sd.Late(cutoff): [*np.zeros(cutoff), *full],
    }
    for schedule, rates in expected.items():
        over_time = probabilities_of(sd.Uniform(1 - rate), ["0"], schedule=schedule)
        assert [1 - over_time.at(step)[0] for step in range(steps)] == pytest.approx(rates)


@pytest.mark.parametrize("name", SHAPES)
def test_every_rule_gives_probabilities(name):
    for blocks in (1, 2, 50):
        assert all(
            0.5 <= p <= 1 for p in survival_probabilities(sd.survival_rule(name, 0.5), blocks)
        )


def test_an_unknown_rule_and_a_rate_of_1_are_refused():
    with pytest.raises(
        sd.errors.SurvivalError, match=r"no survival rule 'keras': choose one of timm"
    ):
        sd.survival_rule("keras", 0.1)
    with pytest.raises(
        sd.errors.SurvivalError, match=r"\('timm', 1\.0\): .* at least 0 and below 1"
    ):
        sd.survival_rule("timm", 1.0)
