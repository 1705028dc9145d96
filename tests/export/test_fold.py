import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import stochastic_depth as sd
from stochastic_depth.export.exponents import FORMS
from stochastic_depth.models import CifarResNet
from stochastic_depth.models.published import published
from stochastic_depth.models.resnet import bottleneck

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}
WIDTH = 8


def randomised(model: nn.Module) -> nn.Module:
    """No gain or layer scale is 0, so that a branch which is not folded is seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand(buffer.shape, generator=generator))
    return model


def outputs(model, example):
    call = {"args": (), "kwargs": example} if isinstance(example, dict) else {"args": (example,)}
    with torch.no_grad():
        result = model(*call["args"], **call.get("kwargs", {}))
    return result if isinstance(result, torch.Tensor) else result[0]


def assert_folds(model: nn.Module, example, survival=None, **options) -> None:
    """`model`, folded, gives the outputs of the applied model, in both precisions."""
    randomised(model).eval()
    keys, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    sd.apply(model, survival or sd.LinearDecay(0.5), example=example, **options)
    for dtype, limit in LIMITS.items():
        mine = copy.deepcopy(model).to(dtype)
        given = example.to(dtype) if torch.is_tensor(example) else example
        expected = outputs(mine, given)
        sd.fold(mine, given)
        actual = outputs(mine, given)
        assert (actual - expected).abs().max() <= limit * expected.abs().max()
        assert list(mine.state_dict()) == keys
        assert [type(module) for module in mine.modules()] == kinds
        with pytest.raises(sd.errors.ApplyError, match="has no stochastic depth"):
            sd.handle_of(mine)


class Net(nn.Module):
    """Residual blocks x + f(x) around what `make` gives, and a head."""

    def __init__(self, make, blocks=3):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(make()) for _ in range(blocks)))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.blocks(x)
        return self.head(x if x.ndim == 2 else x.flatten(2).mean(2))


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.gamma * F.gelu(self.linear(x))


class Sum(nn.Module):
    """A branch with two ends."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return torch.cat((self.left(x)[:, :4], torch.relu(self.right(x))[:, 4:]), 1) + self.bias


class SqueezeAndExcite(nn.Module):
    """The gate is computed from what it is multiplied by."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x):
        x = self.norm(self.conv(x))
        gate = self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class Ghost(nn.Module):
    """One half is computed from the other."""

    def __init__(self):
        super().__init__()
        self.primary, self.cheap = nn.Linear(WIDTH, 4), nn.Linear(4, 4)

    def forward(self, x):
        half = self.primary(torch.tanh(x))
        return torch.cat((half, self.cheap(half)), 1)


class Warp(nn.Module):
    """Samples a picture on a grid that is learned."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.grid = nn.Parameter(torch.rand(6, 6, 2) - 0.5)

    def forward(self, x):
        x, grid = torch.relu(self.conv(x)), self.grid.expand(len(x), -1, -1, -1)
        return F.grid_sample(x, grid, align_corners=False)


def mlp(*tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH), *tail)


def conv(*tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), *tail)


def volume(*tail: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv3d(WIDTH, WIDTH, 3, padding=1), *tail)


ROW, PICTURE = torch.randn(4, WIDTH), torch.randn(4, WIDTH, 6, 6)
VOLUME = torch.randn(2, WIDTH, 4, 4, 4)


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (lambda: mlp(), ROW),
        (lambda: mlp(nn.LayerNorm(WIDTH)), ROW),
        (lambda: mlp(nn.ReLU(), nn.Dropout(0.1)), ROW),
        (lambda: LayerScale(), ROW),
        (lambda: Sum(), ROW),
        (lambda: Ghost(), ROW),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)), ROW),
        (lambda: conv(), PICTURE),
        (lambda: conv(nn.BatchNorm2d(WIDTH)), PICTURE),
        (lambda: conv(nn.GroupNorm(2, WIDTH), nn.LeakyReLU()), PICTURE),
        (lambda: conv(nn.MaxPool2d(3, 1, 1)), PICTURE),
        (lambda: SqueezeAndExcite(), PICTURE),
        (lambda: Warp(), PICTURE),
        (lambda: volume(nn.ReplicationPad3d(1), nn.AvgPool3d(3, 1)), VOLUME),
        (lambda: volume(nn.AvgPool3d(2), nn.Upsample(scale_factor=2, mode="trilinear")), VOLUME),
        (lambda: volume(nn.AvgPool3d(2), nn.Upsample(scale_factor=2)), VOLUME),
    ],
    ids=(
        "linear norm relu scale sum ghost weight-norm conv batch-norm leaky pool squeeze warp "
        "pad trilinear nearest"
    ).split(),
)
def test_a_branch_that_ends_in_something_linear_takes_its_factor(make, example):
    assert_folds(Net(make), example)


def test_the_arguments_of_every_form_are_those_of_its_operation():
    def schemas(operation):
        for name in (operation, f"{operation}_"):
            packet = getattr(torch.ops.aten, name, None)
            overloads = () if packet is None else packet.overloads()
            yield from (getattr(packet, overload)._schema for overload in overloads)

    for operation, form in FORMS.items():
        names = {argument.name for schema in schemas(operation) for argument in schema.arguments}
        assert names or operation == "_grouped_mm", operation  # newer than the oldest PyTorch
        assert not names or names.issuperset(form.factors + form.addends), operation


def test_the_last_batch_norm_of_a_residual_unit_is_multiplied_by_its_p_and_nothing_else():
    model = randomised(CifarResNet(14)).eval()
    handle = sd.apply(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sd.fold(model, torch.randn(2, 3, 16, 16))
    for name, tensor in model.state_dict().items():
        _, _, block = name.partition("blocks.")
        p = 1.0
        if ".branch.4." in name and name.endswith(("weight", "bias")):
            p = handle.survival[int(block.partition(".")[0])]
        assert torch.equal(tensor, before[name] * p), name


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
def test_residual_units_fold_whatever_their_gates(gate):
    assert_folds(CifarResNet(20), torch.randn(4, 3, 16, 16), gate=gate)


def test_projections_are_no_part_of_the_branch():
    assert_folds(nn.Sequential(bottleneck(4, 4, 2), bottleneck(16, 4, 1)), torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torchvision/resnet18", {"shape": (3, 32, 32)}),
        ("torchvision/mobilenet_v3_small", {"shape": (3, 32, 32)}),
        ("timm/vit_tiny_patch16_224", {"depth": 2, "shape": (3, 32, 32), "img_size": 32}),
        ("timm/convnext_atto", {"depths": (1, 1, 1, 1), "shape": (3, 32, 32)}),
        ("timm/seresnet18", {"shape": (3, 32, 32)}),
    ],
)
def test_published_networks_fold(name, options):
    pytest.importorskip(name.partition("/")[0], reason=f"needs {name.partition('/')[0]}")
    model, example = published(name, **options)
    assert_folds(model, example)


SMALL = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 3}),
        (
            "bert",
            {
                "hidden_size": 16,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "num_hidden_layers": 3,
            },
        ),
        ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
    ],
)
def test_transformers_fold(name, options):
    pytest.importorskip("transformers", reason="needs transformers")
    model, example = published(f"transformers/{name}", **SMALL, **options)
    assert_folds(model, example)


class Recurrent(Net):
    def forward(self, x):
        return super().forward(self.blocks(self.blocks(x)))


def test_a_network_of_hundreds_of_blocks_folds():
    units = [sd.Residual(nn.Linear(2, 2)) for _ in range(600)]
    model, x = nn.Sequential(*units).double().eval(), torch.randn(3, 2, dtype=torch.float64)
    sd.apply(model, sd.Uniform(0.5))
    expected = outputs(model, x)
    sd.fold(model, x)
    torch.testing.assert_close(outputs(model, x), expected, rtol=1e-12, atol=0)


def test_weights_that_run_in_several_blocks_take_their_factor_once():
    assert_folds(Recurrent(mlp, blocks=1), ROW, [0.7] * 3)


def test_weights_that_run_in_blocks_of_different_p_cannot_take_both():
    model = Recurrent(mlp, blocks=1)
    sd.apply(model, [0.9, 0.8, 0.7], example=ROW)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(sd.errors.FoldError, match="cannot take its p_l into its weights exactly"):
        sd.fold(model, ROW)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


class Single(nn.Linear):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("not made for float64")
        return super().forward(x)


def test_what_does_not_run_in_float64_is_proved_as_it_is():
    model = Net(lambda: mlp(Single(WIDTH, WIDTH))).eval()
    sd.apply(model, example=ROW)
    expected = outputs(model, ROW)
    sd.fold(model, ROW)
    assert torch.allclose(outputs(model, ROW), expected, rtol=1e-4, atol=1e-6)


class Exhausted(nn.Linear):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return super().forward(x)


def test_too_little_memory_for_float64_is_no_reason_to_check_less_precisely():
    model = Net(lambda: mlp(Exhausted(WIDTH, WIDTH))).eval()
    sd.apply(model, example=ROW)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        sd.fold(model, ROW)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_training_scale_leaves_every_weight_as_it_is():
    model = randomised(CifarResNet(8))
    before = copy.deepcopy(model.state_dict())
    sd.apply(model, scale="training")
    sd.fold(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(before[name], new) for name, new in model.state_dict().items())


def test_a_drop_path_gets_its_rate_back():
    pytest.importorskip("timm", reason="needs timm")
    model, example = published("timm/vit_tiny_patch16_224", depth=2, drop_path_rate=0.2)
    sd.apply(model, "own", example=example)
    sd.fold(model, example)
    assert model.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_a_folded_model_can_be_applied_and_folded_again():
    model = randomised(CifarResNet(8)).double().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for _ in range(2):
        sd.apply(model)
        expected = outputs(model, x)
        sd.fold(model, x)
        assert torch.allclose(outputs(model, x), expected, rtol=1e-9)


class Tied(Net):
    def __init__(self, make):
        super().__init__(make)
        self.blocks[2].inner[2].weight = self.blocks[0].inner[2].weight


class Masked(nn.Sequential):
    """A layer, and a buffer that it is multiplied by."""

    def __init__(self, mask):
        super().__init__(mlp())
        self.register_buffer("mask", mask)

    def forward(self, x):
        return super().forward(x) * self.mask


def with_one_mask() -> nn.Module:
    """All branches end in one buffer."""
    mask = torch.rand(WIDTH)
    return Net(lambda: Masked(mask))


class Averaged(nn.Sequential):
    """A layer, and the running mean of its size that it is multiplied by."""

    def __init__(self):
        super().__init__(mlp(), nn.Tanh())
        self.register_buffer("size", torch.ones(WIDTH))

    def forward(self, x):
        f = super().forward(x)
        if self.training:
            self.size.lerp_(f.detach().abs().mean(0), 0.1)
        return f * self.size


def normed() -> nn.Module:
    """Spectral normalisation, which divides the factor out of the weight again."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(nn.Tanh(), layer)


class Shown(Net):
    """Also returns what its last branch gives."""

    def forward(self, x):
        seen = self.blocks[2].inner(x)
        return super().forward(x) + F.gelu(seen).sum()


@pytest.mark.parametrize(
    ("model", "block", "why"),
    [
        (lambda: Net(lambda: mlp(nn.GELU())), "blocks.0", "passes through gelu"),
        (lambda: Net(lambda: mlp(nn.ReLU6())), "blocks.0", "passes through hardtanh"),
        (lambda: Net(lambda: mlp(nn.LayerNorm(WIDTH, elementwise_affine=False))), "blocks.0", ""),
        (lambda: Tied(mlp), "blocks.0", "'blocks.0.inner.2.weight' is also used"),
        (with_one_mask, "blocks.0", "'blocks.0.inner.mask' is also used"),
        (lambda: Shown(mlp), "blocks.2", "is also used by"),
        (lambda: Net(Averaged), "blocks.0", "buffer '.*size', which training overwrites"),
        (lambda: Net(normed), "blocks.0", "buffer '.*_v', which training overwrites"),
    ],
    ids=["gelu", "relu6", "no-gain", "tied", "tied-buffer", "shown", "average", "spectral-norm"],
)
def test_what_cannot_be_folded_exactly_is_refused_and_left_as_it_was(model, block, why):
    model = model().eval()
    handle = sd.apply(model, example=ROW)
    before, expected = copy.deepcopy(model.state_dict()), outputs(model, ROW)
    with pytest.raises(sd.errors.FoldError, match=f"block '{block}' .*{why}") as error:
        sd.fold(model, ROW)
    assert 'scale="training"' in str(error.value)
    assert sd.handle_of(model) is handle
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert torch.equal(outputs(model, ROW), expected)


def test_a_mask_of_integers_takes_no_factor_but_the_layer_before_it_does():
    assert_folds(Net(lambda: Masked(torch.arange(WIDTH) % 2)), ROW)


@pytest.mark.parametrize(
    ("survival", "schedule"),
    [([1.0, 0.8, 0.0], sd.Steps({0: 1.0})), (lambda block, _, step: (block < 3) * 0.8, None)],
    ids=["schedule", "rule"],
)
def test_a_block_that_does_not_run_yet_is_refused_and_can_be_left_out(survival, schedule):
    model = Net(mlp).eval()
    sd.apply(model, survival, schedule=schedule, example=ROW)
    expected = outputs(model, ROW)
    with pytest.raises(sd.errors.FoldError, match=r"'blocks.2' does not run yet.*sd\.truncate"):
        sd.fold(model, ROW)
    sd.truncate(model, [0, 1], ROW)
    torch.testing.assert_close(outputs(model, ROW), expected)


def test_forced_gates_are_not_folded():
    model = Net(mlp).eval()
    handle = sd.apply(model, example=ROW)
    expected = outputs(model, ROW)
    with handle.subnetwork([True, False, True]):
        sd.fold(model, ROW)
    torch.testing.assert_close(outputs(model, ROW), expected)


def test_a_plain_model_is_told_to_be_applied_first():
    with pytest.raises(sd.errors.ApplyError, match="no stochastic depth"):
        sd.fold(CifarResNet(8), torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_weights_that_a_pass_has_computed_are_no_obstacle():
    model = Net(lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(WIDTH, WIDTH)), mlp()))
    sd.apply(model, sd.Uniform(0.5), example=ROW)
    model(ROW).sum().backward()  # leaves weights that are in the graph
    expected = model.eval()(ROW)
    sd.fold(model, ROW)
    torch.testing.assert_close(model(ROW), expected)
