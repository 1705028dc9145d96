import copy
import itertools
import math

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet, ImageNetResNet
from stochastic_depth.models.published import published

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def network(depth=20) -> CifarResNet:
    """Gains that are not zero, statistics that have seen data."""
    model = CifarResNet(depth, init="he")
    model.train()(X)
    return model.eval()


def closed_outputs(model, closed, x):
    """Of the model before, by its gates."""
    handle = sd.handle_of(model)
    gates = [number not in closed for number in range(len(handle.blocks))]
    with handle.forced(gates, scaled=True), torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(x)
    return out if torch.is_tensor(out) else out[0]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1, [0, 3, 6]), (2, [0, 1, 3, 4, 6, 7]), (9, list(range(9))), ([1, 5, 8], [1, 5, 8])],
)
def test_the_first_of_each_stage_or_those_that_are_named_stay(keep, kept):
    model = network()
    sd.apply(model)
    closed = set(range(9)) - set(kept)
    expected = closed_outputs(model, closed, X)
    before = set(model.state_dict())
    sd.truncate(model, keep, X)
    assert torch.allclose(model(X), expected, rtol=1e-4, atol=1e-5)
    gone = {name for name in before if any(name.startswith(f"blocks.{n}.") for n in closed)}
    assert set(model.state_dict()) == before - gone
    assert type(model) is CifarResNet


def test_without_its_branch_a_transition_still_pools_and_pads():
    model = network()
    sd.apply(model)
    expected = closed_outputs(model, {3}, X)
    sd.truncate(model, [n for n in range(9) if n != 3], X)
    assert torch.allclose(model(X), expected, rtol=1e-4, atol=1e-5)
    assert model.blocks[3](torch.ones(1, 16, 8, 8)).shape == (1, 32, 4, 4)


def test_a_projection_keeps_its_weights_and_their_names():
    model = ImageNetResNet(50, classes=3).eval()
    sd.apply(model)
    x = torch.randn(2, 3, 32, 32)
    sd.truncate(model, [0, 1], x)
    assert model.get_submodule("blocks.3.shortcut.0").weight.shape[:2] == (512, 256)
    assert not any(name.startswith("blocks.3.branch") for name in model.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the exporter, about itself
def test_what_is_left_is_tuned_and_exported(tmp_path):
    model = network(14)
    sd.apply(model)
    sd.truncate(model, 1, X)
    handle = sd.apply(model)
    assert len(handle.survival) == 3
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = F.cross_entropy(model(X), torch.arange(4))
    for _ in range(3):
        optimizer.zero_grad()
        tuned = F.cross_entropy(model(X), torch.arange(4))
        tuned.backward()
        optimizer.step()
    assert tuned < before
    expected = model.eval()(X).detach()
    sd.fold(model, X)
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict(), strict=True)
    any_batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (X,), dynamic_shapes=any_batch)
    torch.onnx.export(
        program, f=tmp_path / "net.onnx", input_names=["x"], verbose=False, external_data=False
    )
    session = onnxruntime.InferenceSession(
        tmp_path / "net.onnx", providers=["CPUExecutionProvider"]
    )
    for few in (X, X[:1], X[:3]):
        assert torch.allclose(program.module()(few), expected[: len(few)], rtol=1e-4, atol=1e-5)
        (logits,) = session.run(None, {"x": few.numpy()})
        assert torch.allclose(torch.from_numpy(logits), expected[: len(few)], rtol=1e-4, atol=1e-5)


def test_recalibration_takes_the_statistics_of_what_is_left():
    model = network()
    sd.apply(model)
    sd.truncate(model, 1, X, recalibrate=[X])
    norm, seen = model.get_submodule("blocks.3.branch.1"), {}
    mean = norm.running_mean.double().clone()
    norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    model.train()(X)
    assert torch.allclose(mean, seen["x"].double().mean((0, 2, 3)), atol=1e-6)


class Grouped(nn.Module):
    """A residual group of residual blocks."""

    def __init__(self):
        super().__init__()
        inner = (sd.Residual(nn.Linear(8, 8)) for _ in range(2))
        self.body = nn.Sequential(*inner, nn.Linear(8, 8))

    def forward(self, x):
        return x + self.body(x)


@pytest.mark.parametrize("kept", [[0, 1, 4, 5], [0, 1, 2, 3, 4, 5], [2, 5], [2, 3, 4, 5]])
def test_blocks_inside_a_removed_block_are_removed_with_it(kept):
    model, x = nn.Sequential(*(Grouped() for _ in range(3))).double(), torch.rand(4, 8).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=x)
    names = [block.name for block in handle.blocks]
    assert names == [f"{n}{inner}" for n in range(3) for inner in (".body.0", ".body.1", "")]
    with handle.subnetwork([n in kept for n in range(9)], scaled=True):
        expected = model.eval()(x)
    sd.truncate(model, kept, x)
    assert len(model) == sum(n in kept for n in (2, 5, 8))
    torch.testing.assert_close(model(x), expected)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.f(x)


class Around(nn.Module):
    """A residual group, whose blocks are in a list."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Sequential(Plain(), Plain()), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.out(self.inner(x))


def test_a_list_and_a_list_inside_it_both_lose_blocks():
    model, x = nn.Sequential(*(Around() for _ in range(3))).double(), torch.rand(4, 8).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=x)
    names = [block.name for block in handle.blocks]
    closed = [name.split(".")[0] == "0" or name == "2.inner.0" for name in names]
    with handle.subnetwork([not c for c in closed], scaled=True):
        expected = model.eval()(x)
    sd.truncate(model, [n for n, name in enumerate(names) if name not in ("0", "2.inner.0")], x)
    assert [len(each.inner) for each in model] == [2, 1]
    torch.testing.assert_close(model(x), expected)


def test_of_the_units_of_one_module_all_stay_or_none():
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, batch_first=True) for _ in range(3)))
    x = torch.rand(2, 4, 8)
    sd.apply(model, sd.Uniform(0.5), example=x, granularity="unit")
    with pytest.raises(sd.errors.TruncateError, match=r"\[0, 1\] are all in '0'.*or none"):
        sd.truncate(model, range(1, 6), x)


@pytest.mark.parametrize("batches", [iter(()), []])
def test_a_recalibration_without_a_batch_is_refused_and_leaves_the_statistics(batches):
    model = network()
    sd.apply(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(sd.errors.TruncateError, match="an iterator can be used once"):
        sd.truncate(model, 1, X, recalibrate=batches)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_batches_that_fail_in_recalibration_leave_the_model_as_it_was():
    def batches():
        yield X
        raise OSError("a picture cannot be read")

    model = network()
    handle = sd.apply(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="a picture"):
        sd.truncate(model, 1, X, recalibrate=batches())
    assert sd.handle_of(model) is handle
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "keep", "shallower"),
    [
        ("torchvision/resnet34", {"shape": (3, 32, 32)}, 2, "torchvision/resnet18"),
        (
            "timm/vit_tiny_patch16_224",
            {"depth": 4, "img_size": 32, "shape": (3, 32, 32)},
            3,
            ("timm/vit_tiny_patch16_224", {"depth": 3, "img_size": 32, "shape": (3, 32, 32)}),
        ),
        (
            "transformers/gpt2",
            {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 99},
            [0, 2],
            ("transformers/gpt2", {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 99}),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_foreign_network_becomes_the_same_architecture_built_shallower(
    name, options, keep, shallower
):
    pytest.importorskip(name.partition("/")[0], reason=f"needs {name.partition('/')[0]}")
    model, x = published(name, **options)
    model.eval()
    handle = sd.apply(model, example=x)
    blocks = range(len(handle.blocks))
    stage_wise = [0, 1, 3, 4, 7, 8, 13, 14]
    kept = keep if isinstance(keep, list) else stage_wise if len(blocks) == 16 else range(keep)
    expected = closed_outputs(model, set(blocks) - set(kept), x)
    sd.truncate(model, keep, x)
    other = (shallower, options) if isinstance(shallower, str) else shallower
    built, _ = published(other[0], **other[1])
    built.eval().load_state_dict(model.state_dict(), strict=True)
    out = built(**x) if isinstance(x, dict) else built(x)
    assert torch.allclose(out if torch.is_tensor(out) else out[0], expected, rtol=1e-4, atol=1e-5)
    if name.startswith("transformers"):
        assert model.config.num_hidden_layers == 2
        assert [layer.attn.layer_idx for layer in model.h] == [0, 1]


class PostNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(x + torch.relu(self.linear(x)))


def test_a_block_that_does_more_than_pass_on_its_input_is_refused_by_name():
    model = nn.Sequential(*(PostNorm() for _ in range(3))).eval()
    x = torch.randn(2, 8)
    sd.apply(model, example=x)
    expected = model(x)
    with pytest.raises(sd.errors.TruncateError, match=r"block '2' \(PostNorm\)"):
        sd.truncate(model, [0, 1], x)
    assert torch.equal(model(x), expected)
    assert len(sd.handle_of(model).blocks) == 3


@pytest.mark.parametrize(
    ("keep", "said"),
    [(n, f"keep={n}: at least the first block of each stage is kept") for n in (0, -1)]
    + [
        ([9], r"keep=\[9\]: give different positions"),
        ([0, 0], r"keep=\[0, 0\]: give different positions"),
    ]
    + [([-1], r"keep=\[-1\]: give different positions")]
    + [([True] * 9, "which are gates: give different positions")]
    + [(torch.ones(9, dtype=torch.bool), "which are gates: give different positions")],
)
def test_a_choice_that_does_not_fit_is_refused(keep, said):
    model = network()
    sd.apply(model)
    with pytest.raises(sd.errors.TruncateError, match=said):
        sd.truncate(model, keep, X)


LABELS = torch.tensor([0, 1, 2, 3])


def loss(model):
    assert not model.training
    with torch.no_grad():
        return F.cross_entropy(model(X), LABELS).item()


def test_blocks_are_dropped_in_the_order_that_costs_least_at_each_step():
    model = network(14)
    sd.apply(model, sd.Uniform(1.0))
    model.train()
    found = list(sd.drop_order(model, loss))
    assert model.training
    model.eval()
    dropped: set[int] = set()
    for step in found:
        tried = {
            n: F.cross_entropy(closed_outputs(model, dropped | {n}, X), LABELS).item()
            for n in set(range(6)) - dropped
        }
        assert step.block == min(tried, key=lambda n: tried[n])
        assert step.loss == pytest.approx(tried[step.block])
        assert step.evaluations == len(tried)
        dropped.add(step.block)
    assert len(found) == 6


def test_a_block_without_which_the_loss_is_nan_is_dropped_last():
    model = network(14)
    first = sd.apply(model).blocks[0].module
    assert isinstance(first, sd.Residual)
    ran = []
    first.branch.register_forward_hook(lambda *_: ran.append(first))

    def nan_without_it(model):
        ran.clear()
        model(X)
        return 1.0 if ran else math.nan

    assert [step.block for step in sd.drop_order(model, nan_without_it)][-1] == 0


def test_a_search_gives_each_module_its_own_mode_back():
    model = network(14)
    sd.apply(model)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    next(sd.drop_order(model, loss))
    assert model.training
    assert not frozen.training


def test_the_blocks_that_validation_chose_stay_and_lose_what_was_foretold():
    model = network(14)
    sd.apply(model)
    found = list(itertools.islice(sd.drop_order(model, loss), 3))
    assert sum(step.evaluations for step in found) == 6 + 5 + 4
    sd.truncate(model, sorted(set(range(6)) - {step.block for step in found}), X)
    assert len(sd.apply(model, sd.Uniform(1.0)).blocks) == 3
    assert loss(model) == pytest.approx(found[-1].loss, rel=1e-4)


def test_a_search_that_fails_or_is_left_leaves_no_trace():
    model = network(14)
    sd.apply(model)
    expected = model(X)

    def fails(model):
        raise RuntimeError("out of memory")

    model.train()
    assert len(list(itertools.islice(sd.drop_order(model, lambda m: 0.0), 2))) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        next(sd.drop_order(model, fails))
    assert model.training
    assert torch.equal(model.eval()(X), expected)


def of_transformers(name):
    hf = pytest.importorskip("transformers", reason="needs transformers")
    small = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16}
    ids = torch.arange(6)[None]
    if name == "T5":
        config = hf.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=3, num_heads=2, use_cache=False
        )
        return hf.T5Model(config), {"input_ids": ids, "decoder_input_ids": ids}
    if name == "Swin":
        config = hf.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[3, 2], num_heads=[1, 2], window_size=2
        )
        return hf.SwinModel(config), {"pixel_values": X[:1, :, :16, :16]}
    if name == "Whisper":
        config = hf.WhisperConfig(
            vocab_size=20, d_model=8, encoder_layers=3, decoder_layers=3, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=4,
            max_source_positions=8, max_target_positions=8, use_cache=False, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        features = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))
        return hf.WhisperModel(config), {"input_features": features, "decoder_input_ids": ids}
    if name == "Qwen3Moe":  # of which two layers are no mixtures
        config = hf.Qwen3MoeConfig(
            **small, num_hidden_layers=4, num_key_value_heads=1, head_dim=4, use_cache=False,
            num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8, mlp_only_layers=[1, 3],
        )  # fmt: skip
        return hf.Qwen3MoeModel(config), {"input_ids": ids}
    config = hf.Qwen3Config(
        **small, num_hidden_layers=4, num_key_value_heads=1, head_dim=4, use_cache=False,
        use_sliding_window=True, sliding_window=2, max_window_layers=2,
    )  # fmt: skip
    return hf.Qwen3Model(config), {"input_ids": ids}


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("T5", [0, 1, 2, 3, 5]),
        ("T5", [0, 2, 3]),
        ("Swin", [0, 1, 3]),
        ("Qwen3", [0, 3]),
        ("Whisper", [0, 2, 3, 5]),
        ("Qwen3Moe", [0, 1, 3]),
    ],
)
def test_a_truncated_model_of_transformers_is_the_same_when_saved_and_loaded(name, keep, tmp_path):
    torch.manual_seed(0)
    model, example = of_transformers(name)
    sd.apply(model, sd.Uniform(0.8), example=example)
    shared = model.config
    before = shared.to_dict()
    sd.truncate(model, keep, example)
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**example)[0], model(**example)[0])
    assert shared.to_dict() == before  # which other models may have too


def test_what_a_config_cannot_say_is_refused_before_anything_changes():
    torch.manual_seed(0)
    model, example = of_transformers("Swin")  # whose second layer of a stage shifts its windows
    sd.apply(model, sd.Uniform(0.8), example=example)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        sd.errors.TruncateError, match="its config cannot describe which layers are left"
    ):
        sd.truncate(model, [0, 2, 3], example)
    assert model.config.depths == [3, 2]
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


class Lists(nn.Module):
    """A trunk whose layers and norms are in lists of their own, and share a dropout."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(layers))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.dropout(layer(norm(x)))
        return x


@pytest.mark.parametrize("keep", [[0], [2], [0, 2], [1, 2]])
def test_of_several_lists_each_gives_what_belongs_to_the_block(keep):
    model, x = Lists(3), torch.randn(4, 6)
    sd.apply(model, sd.Uniform(0.5), example=x)
    expected = x
    for number in keep:
        branch = model.layers[number](model.norms[number](expected))
        expected = expected + 0.5 * branch
    sd.truncate(model, keep, x)
    assert len(model.layers) == len(model.norms) == len(keep)
    torch.testing.assert_close(model.eval()(x), expected)
