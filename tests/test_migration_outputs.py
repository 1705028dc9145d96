"""Trained as other libraries train: the same outputs, with the same probabilities."""

import copy
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

pytestmark = pytest.mark.usefixtures("one_thread")


def outputs(run: Callable[[], Tensor], passes: int) -> Counter[tuple[float, ...]]:
    """How often each output occurred, sample by sample; every sample of a batch is the same."""
    torch.manual_seed(0)
    random.seed(0)
    with torch.no_grad():
        return Counter(
            tuple(round(v, 8) + 0.0 for v in sample.flatten()[:4].tolist())
            for _ in range(passes)
            for sample in run()
        )


def assert_same_distribution(one: Counter, other: Counter, patterns: int) -> None:
    assert one.keys() == other.keys()
    assert len(one) == patterns
    table = [[counts[key] for key in one] for counts in (one, other)]
    assert stats.chi2_contingency(table).pvalue > 0.01


def same_samples(*shape: int, samples: int) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(1, *shape, dtype=torch.float64, generator=rng).repeat_interleave(samples, 0)


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_timms_drop_path(gate) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 3, "num_heads": 2}
    theirs = timm.models.VisionTransformer(**sizes, num_classes=4, drop_path_rate=0.6).double()
    ours = copy.deepcopy(theirs)
    x = same_samples(3, 8, 8, samples=50)
    handle = sd.apply(ours, "own", example=x[:2], gate=gate, scale="training", granularity="unit")
    assert handle.survival == pytest.approx([1, 1, 0.7, 0.7, 0.4, 0.4])
    one, other = (outputs(lambda m=m: m.train()(x), passes=40) for m in (theirs, ours))
    assert_same_distribution(one, other, patterns=16)
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


@pytest.mark.parametrize(
    ("mode", "gate", "samples"), [("row", "sample", 50), ("batch", "batch", 1)]
)
def test_torchvisions_stochastic_depth(mode, gate, samples) -> None:
    convnext = pytest.importorskip("torchvision.models.convnext", reason="needs torchvision")
    torch.manual_seed(0)
    stages = [convnext.CNBlockConfig(4, 8, 2), convnext.CNBlockConfig(8, None, 2)]
    theirs = convnext.ConvNeXt(stages, 0.6, layer_scale=1.0, num_classes=4).double()
    for module in theirs.modules():
        if type(module).__name__ == "StochasticDepth":
            module.mode = mode
    ours = copy.deepcopy(theirs)
    x = same_samples(3, 16, 16, samples=samples)
    example = torch.cat([x[:1]] * 2)
    handle = sd.apply(ours, "own", example=example, gate=gate, scale="training")
    assert handle.survival == pytest.approx([1, 0.8, 0.6, 0.4])
    one, other = (outputs(lambda m=m: m.train()(x), 1200 // samples) for m in (theirs, ours))
    assert_same_distribution(one, other, patterns=8)
    assert torch.equal(theirs.eval()(x), ours.eval()(x))


def authors(model: CifarResNet, rates: list[float], x: Tensor) -> Tensor:
    """ResidualDrop.lua and the gates of main.lua, written again."""
    h = model.stem(x)
    for block, rate in zip(model.blocks, rates, strict=True):
        is_open = not random.random() < rate
        shortcut = h if block.shortcut is None else block.shortcut(h)
        if not model.training:
            h = shortcut + block.branch(h) * (1 - rate)
        else:
            h = shortcut + block.branch(h) if is_open else shortcut
        h = torch.relu(h)
    return model.head(h.mean((2, 3)))


@pytest.mark.parametrize("mode", ["lin_decay", "uniform"])
def test_the_authors_death_rate(mode) -> None:
    death_rate = 0.6
    theirs = CifarResNet(8, init="he").double()
    ours = copy.deepcopy(theirs)
    rates = [death_rate * (i / 3 if mode == "lin_decay" else 1) for i in (1, 2, 3)]
    rule = sd.LinearDecay if mode == "lin_decay" else sd.Uniform
    handle = sd.apply(ours, rule(1 - death_rate))
    assert [1 - p for p in handle.survival] == pytest.approx(rates)
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=rng)
    one = outputs(lambda: authors(theirs.train(), rates, x)[:1], passes=1000)
    other = outputs(lambda: ours.train()(x)[:1], passes=1000)
    assert_same_distribution(one, other, patterns=8)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(authors(theirs.eval(), rates, x), ours.eval()(x))


def opt(layerdrop: float, layers: int = 3) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=layers, num_attention_heads=1, ffn_dim=8,
        word_embed_proj_dim=8, dropout=0.0, layerdrop=layerdrop, use_cache=False,
        init_std=0.5,
    )  # fmt: skip
    return transformers.OPTModel(config).double()


def test_layerdrop_of_transformers() -> None:
    theirs = opt(layerdrop=0.4)
    ours = copy.deepcopy(theirs)
    ids = torch.arange(4)[None]
    sd.apply(ours, sd.survival_rule("transformers", 0.4), example={"input_ids": ids})
    one, other = (
        outputs(lambda m=m: m.train()(input_ids=ids).last_hidden_state, passes=1000)
        for m in (theirs, ours)
    )
    assert_same_distribution(one, other, patterns=8)
    sd.remove(ours)
    final = [m.eval()(input_ids=ids).last_hidden_state for m in (theirs, ours)]
    assert torch.equal(*final), "the test of layerdrop scales nothing"


def test_layerdrop_of_fairseq() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(3))).double()
    theirs = copy.deepcopy(ours)
    sd.apply(ours, sd.survival_rule("fairseq", 0.4))
    x = same_samples(4, samples=1)

    def fairseq() -> Tensor:
        """A pass over LayerDropModuleList, written again."""
        h = x
        for layer, u in zip(theirs, torch.empty(3).uniform_(), strict=True):
            h = layer(h) if u > 0.4 else h
        return h

    assert_same_distribution(
        outputs(fairseq, passes=1000), outputs(lambda: ours(x), passes=1000), patterns=8
    )


def test_a_models_own_layerdrop_is_taken_over_and_given_back() -> None:
    model = opt(layerdrop=0.9, layers=6)
    ran: list[int] = []
    for number, layer in enumerate(model.decoder.layers):
        layer.fc1.register_forward_hook(lambda *_, number=number: ran.append(number))
    ids = {"input_ids": torch.arange(4)[None]}
    handle = sd.apply(model, sd.Uniform(0.8), example=ids)
    assert model.decoder.layerdrop == 0.0
    for _ in range(10):
        ran.clear()
        model.train()(**ids)
        assert ran == handle.gates.nonzero().flatten().tolist()
    sd.remove(model)
    assert model.decoder.layerdrop == 0.9


def test_a_layerdrop_in_the_configuration_is_taken_over_and_given_back() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
        conv_dim=(4, 4), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, layerdrop=0.9, apply_spec_augment=False,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config)
    handle = sd.apply(
        model, sd.Uniform(0.9), example=torch.randn(2, 400), include=["encoder.layers"]
    )
    ran: list[int] = []
    for number, layer in enumerate(model.encoder.layers):
        layer.attention.register_forward_hook(lambda *_, number=number: ran.append(number))
    for _ in range(5):
        ran.clear()
        model.train()(torch.randn(2, 400))
        assert ran == handle.gates.nonzero().flatten().tolist()
    sd.remove(model)
    assert config.layerdrop == 0.9


def test_a_layerdrop_around_blocks_that_are_left_alone_stays() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BartConfig(
        vocab_size=20, d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8, encoder_layerdrop=0.2,
        decoder_layerdrop=0.3, use_cache=False,
    )  # fmt: skip
    model = transformers.BartModel(config)
    ids = torch.arange(4)[None]
    sd.apply(model, example={"input_ids": ids, "decoder_input_ids": ids}, include=["decoder"])
    assert (model.encoder.layerdrop, model.decoder.layerdrop) == (0.2, 0.0)
