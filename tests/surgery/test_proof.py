"""What is proved is what runs: training mode, no hooks, samples, and nothing is left behind."""

import contextlib
import copy
import itertools
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.errors import ApplyError, UnsupportedBlockError
from stochastic_depth.surgery.proof.gated import Gated, closed_sets

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.f(x))


class Trunk(nn.Module):
    """Three blocks behind a stem; `around` wraps what the forward pass does."""

    def __init__(self, block: type[nn.Module] = Plain) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("blocks", "number"), [(0, 0), (1, 1), (2, 3), (3, 4), (6, 5), (7, 6), (20, 7), (54, 9)]
)
def test_sets_of_closed_blocks_tell_each_pair_apart_in_logarithmic_number(blocks, number):
    sets = closed_sets(blocks)
    assert len(sets) == number
    assert not blocks or sets[0] == list(range(blocks))
    assert all(sets)
    for one, other in itertools.combinations(range(blocks), 2):
        assert any(one in each and other not in each for each in sets)
        assert any(other in each and one not in each for each in sets)


class Counted(Trunk):
    """Counts its forward passes."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(blocks))
        self.passes = itertools.count()

    def forward(self, x):
        next(self.passes)
        return super().forward(x)


@pytest.mark.parametrize("gate", ["batch", "sample"])
def test_without_time_one_set_of_blocks_is_closed_however_many_there_are(gate):
    def passes(blocks: int, budget: float | None) -> int:
        model = Counted(blocks)
        assert len(sd.apply(model, example=X, gate=gate, budget=budget).blocks) == blocks
        return next(model.passes)

    assert passes(12, budget=0.0) == passes(1, budget=None)
    assert passes(12, budget=100.0) == passes(12, budget=None) > passes(12, budget=0.0)
    with pytest.raises(sd.errors.ApplyError, match="budget='3': give the seconds"):
        sd.apply(Counted(1), example=X, budget="3")


class SkipsLayersInTheLoop(Trunk):
    """As LayerDropModuleList and its copies: under no name that is known."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if not self.training or torch.rand(()) < 0.5:
                x = block(x)
        return x


class ThrowsCoinInMethod(Plain):
    def forward(self, x):
        if self.training and random.random() < 0.5:
            return x
        return x + torch.relu(self.f(x))


@pytest.mark.parametrize("model", [SkipsLayersInTheLoop, lambda: Trunk(ThrowsCoinInMethod)])
def test_a_layer_drop_of_the_models_own_is_refused_whatever_it_is_called(model):
    reason = (
        "passes in training mode the model itself leaves it out: set the model's own layer drop"
    )
    with pytest.raises(UnsupportedBlockError, match=reason):
        sd.apply(model(), sd.Uniform(0.5), example=X)


class OtherPathInTraining(Plain):
    def forward(self, x):
        if self.training:
            some = torch.arange(len(x) // 2)
            return x.index_add(0, some, torch.relu(self.f(x[some])))
        return x + torch.relu(self.f(x))


def test_a_path_of_training_alone_that_no_gate_is_on_is_refused():
    reason = "in training mode it does not make the addition that it makes in evaluation"
    with pytest.raises(UnsupportedBlockError, match=reason):
        sd.apply(Trunk(OtherPathInTraining), example=X)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_torchs_encoder_multiplies_by_p_and_closes_blocks_without_gradients(norm_first, padded):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not norm_first).eval()
    example = {"src": torch.randn(2, 5, 8)}
    if padded:
        example["src_key_padding_mask"] = torch.arange(5).expand(2, 5) > 3
    handle = sd.apply(model, sd.Uniform(0.5), example=example)
    model.eval()
    slow = model(**example)
    with torch.no_grad():
        torch.testing.assert_close(model(**example), slow, rtol=1e-4, atol=1e-5)
        with handle.subnetwork([False] * 3):
            closed = model(**example)
    if norm_first:
        torch.testing.assert_close(closed, example["src"])
    else:
        expected = example["src"]
        for block in model.layers:
            expected = block.norm2(block.norm1(expected))
        torch.testing.assert_close(closed, expected, rtol=1e-4, atol=1e-5)
    sd.remove(model)
    assert all(block.activation_relu_or_gelu for block in model.layers)


class ReplacesTensors(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.codes = nn.Parameter(torch.ones(8), requires_grad=False)
        self.seen: list[int] = []

    def forward(self, x):
        self.seen.append(len(x))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.codes = nn.Parameter(self.codes * 0.5, requires_grad=False)
            self.stem.weight.data.mul_(1.5)
        x.mul_(2)
        return super().forward(x - self.mean) + self.codes.sum()


def test_a_look_leaves_the_very_tensors_the_input_and_the_random_states():
    model, example = ReplacesTensors(), X.clone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = model.mean, model.codes
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    sd.apply(model, sd.Uniform(0.5), example=example)
    assert model.mean is held[0]
    assert model.codes is held[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.seen == []
    assert torch.equal(example, X)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_a_configuration_that_models_share_is_changed_for_the_model_alone():
    class Config:
        layerdrop = 0.5

    class Configured(Trunk):
        def __init__(self, config):
            super().__init__()
            self.config = config

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                if not self.training or torch.rand(()) >= self.config.layerdrop:
                    x = block(x)
            return x

    config = Config()
    one, other = Configured(config), Configured(config)
    sd.apply(one, example=X)
    assert (one.config.layerdrop, other.config.layerdrop) == (0.0, 0.5)
    sd.remove(one)
    assert one.config.layerdrop == 0.5


class DropPath(nn.Module):
    def __init__(self, rate) -> None:
        super().__init__()
        self.drop_prob = rate

    def forward(self, x):
        if not self.training or not self.drop_prob:
            return x
        return x * (torch.rand(len(x), 1) >= float(self.drop_prob))


@pytest.mark.parametrize("kind", [float, torch.tensor, np.float32, np.float64])
def test_a_rate_is_a_number_of_any_library(kind):
    class Dropped(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.drop_path = DropPath(kind(0.3))

        def forward(self, x):
            return x + self.drop_path(torch.relu(self.f(x)))

    model = Trunk(Dropped)
    handle = sd.apply(model, "own", example=X)
    assert handle.survival == (0.7, 0.7, 0.7)
    model.train()
    with handle.full_depth():
        assert torch.equal(model(X), model(X))
    sd.remove(model)
    assert float(model.blocks[0].drop_path.drop_prob) == pytest.approx(0.3)


class LeavesLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.loss = nn.Linear(8, 8), torch.zeros(())

    def forward(self, x):
        y = self.f(x)
        self.loss = y.pow(2).mean()
        return y


class WithLoss(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.f = LeavesLoss()


def test_a_loss_that_a_branch_leaves_on_its_module_is_that_of_the_step():
    model = Trunk(WithLoss)
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    model.train()
    for _ in range(12):
        model.zero_grad()
        y = model(X)
        losses = [block.f.loss for block in model.blocks]
        assert [bool(loss != 0) for loss in losses] == handle.gates.tolist()
        (y.sum() + sum(losses)).backward()


def test_samples_first_is_proved_and_time_first_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, norm_first=True)
    time_first = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for gate in ("sample", "subset"):
        with pytest.raises(
            ApplyError, match=r'is not the batch .*; use gate="batch", or put the batch first'
        ):
            sd.apply(time_first, example=torch.randn(5, 2, 8), gate=gate)
    with pytest.raises(ApplyError, match="at least two samples"):
        sd.apply(Trunk(), example=X[:1], gate="sample")


class Opaque:
    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_outputs_are_found_in_objects_and_missed_nowhere():
    class Wraps(Trunk):
        def forward(self, x):
            return Opaque(super().forward(x))

    class Hides(Trunk):
        def forward(self, x):
            y = super().forward(x)
            return lambda: y

    assert len(sd.apply(Wraps(), example=X).blocks) == 3
    with pytest.raises(ApplyError, match="no tensor was found"):
        sd.apply(Hides(), example=X)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_example_without_a_finite_output_proves_nothing(value):
    model = Trunk()
    with pytest.raises(ApplyError, match="Trunk returns no finite number on the example"):
        sd.apply(model, example=torch.full_like(X, value))
    assert len(sd.apply(model, example=X).blocks) > 1
    with pytest.raises(ApplyError, match="no finite number"):
        sd.verify(model, torch.full_like(X, value))


def test_structure_is_found_on_the_meta_device_and_values_are_verified_later():
    with torch.device("meta"):
        model, example = Trunk(), torch.randn(4, 8)
    sd.apply(model, example=example)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    assert sd.verify(model, X, repeats=1).blocks == 3


def test_a_model_that_draws_in_evaluation_is_applied():
    class Noisy(Trunk):
        def forward(self, x):
            return super().forward(x + torch.randn_like(x))

    assert len(sd.apply(Noisy(), example=X).blocks) == 3


def test_noise_in_a_branch_is_named_as_the_cause():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    class NoisyBranch(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(Noise(), nn.Linear(8, 8))

    with pytest.raises(UnsupportedBlockError, match="draws random numbers in evaluation"):
        sd.apply(Trunk(NoisyBranch), example=X)


class Listed(Plain):
    """Lists a loss of its branch for the model, in a method that no gate is in."""

    def listed(self, h, losses):
        losses.append(h.square().mean())
        return h

    def forward(self, x, losses):
        h = self.listed(self.f(x), losses)
        return x + h


class NoisyInput(Trunk):
    def __init__(self) -> None:
        super().__init__(Listed)

    def forward(self, x):
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        losses = [x.square().mean()]
        for block in self.blocks:
            x = block(x, losses)
        return (x, sum(losses)) if self.training else x


def test_noise_outside_of_the_branches_excuses_no_other_output_in_training():
    with pytest.raises(UnsupportedBlockError, match="in training mode"):
        sd.apply(NoisyInput(), example=X)


class ForgetsScale(Plain):
    """Is registered with a function that does not multiply its branch."""


class TwiceTheBranch(Plain):
    """Is registered with a function that adds twice its branch, which is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.f.weight)
        nn.init.zeros_(self.f.bias)


class TwiceATinyBranch(Plain):
    """The same, with a branch that LayerScale makes small."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x):
        return x + self.gamma * torch.relu(self.f(x))


@sd.register_unit(ForgetsScale)
def forgets_scale(block, gate, x):
    return x + torch.relu(block.f(x)) if gate.open else x


@sd.register_unit(TwiceTheBranch)
def twice_the_branch(block, gate, x):
    return x + 2 * gate.scale(torch.relu(block.f(x))) if gate.open else x


@sd.register_unit(TwiceATinyBranch)
def twice_a_tiny_branch(block, gate, x):
    return x + 2 * gate.scale(block.gamma * torch.relu(block.f(x))) if gate.open else x


class ScalesTwice(Plain):
    pass


class ScalesTooEarly(Plain):
    pass


@sd.register_unit(ScalesTwice)
def scales_twice(block, gate, x):
    return x + gate.scale(gate.scale(torch.relu(block.f(x)))) if gate.open else x


@sd.register_unit(ScalesTooEarly)
def scales_too_early(block, gate, x):
    return x + torch.relu(block.f(x) + gate.scale(x) - x) if gate.open else x


@pytest.mark.parametrize(
    "block", [ForgetsScale, ScalesTwice, ScalesTooEarly, TwiceTheBranch, TwiceATinyBranch]
)
def test_a_registered_function_with_other_outputs_is_refused_however_small_they_are(block):
    torch.manual_seed(0)
    model = Trunk(block)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    doubles = block in (TwiceTheBranch, TwiceATinyBranch)
    reason = "must use gate.scale, once"
    if doubles:
        reason = f"with every gate open the output.* sd.register_unit has for {block.__name__}"
    with pytest.raises(UnsupportedBlockError, match=reason):
        sd.apply(model, example=X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class DetachesClosed(Plain):
    pass


class DetachesOpen(Plain):
    pass


@sd.register_unit(DetachesClosed)
def detaches_closed(block, gate, x):
    return x + gate.scale(torch.relu(block.f(gate.select(x)))) if gate.open else x.detach()


@sd.register_unit(DetachesOpen)
def detaches_open(block, gate, x):
    return x + gate.scale(torch.relu(block.f(gate.select(x.detach())))) if gate.open else x


@pytest.mark.parametrize("scale", ["inference", "training"])
@pytest.mark.parametrize(
    ("block", "state"), [(DetachesClosed, "closed"), (DetachesOpen, "open")], ids=["closed", "open"]
)
def test_a_registered_function_that_loses_a_gradient_is_refused(block, state, scale):
    with pytest.raises(
        UnsupportedBlockError, match=rf"'blocks.0' {state} the gradient of 'stem.\w+' is not that"
    ):
        sd.apply(Trunk(block), example=X, scale=scale)


def test_gates_for_single_samples_are_proved_on_the_cpu_whatever_the_default_device():
    model = Trunk()
    with torch.device("meta"):
        sd.apply(model, example=X, gate="sample")


class Zero(Plain):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.f.weight)
        self.gamma = nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x):
        return x + self.gamma * self.f(x)


def test_parameters_that_are_nearly_zero_are_so_again_after_the_proof():
    torch.manual_seed(0)
    model = Trunk(Zero)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sd.apply(model, sd.Uniform(0.5), example=X)
    sd.verify(model, X, repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Interrupted(Trunk):
    """Is interrupted in one of its forward passes."""

    def __init__(self, at: int) -> None:
        super().__init__(Zero)
        self.passes = itertools.count()
        self.at = at

    def forward(self, x):
        if next(self.passes) == self.at:
            raise KeyboardInterrupt
        return super().forward(x)


def test_ctrl_c_in_any_pass_of_the_proof_leaves_the_model_as_it_was():
    for at in itertools.count():
        torch.manual_seed(0)
        model = Interrupted(at)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        gradient = model.stem.weight.grad = torch.ones(8, 8)
        try:
            sd.apply(model, sd.Uniform(0.5), example=X, gate="subset")
        except KeyboardInterrupt:
            assert all(
                type(module) in (Trunk, Interrupted, Zero) for module in (model, *model.blocks)
            )
            assert not any("stochastic_depth" in name for m in model.modules() for name in vars(m))
        else:
            break
        finally:
            assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
            assert model.training
            assert model.stem.weight.grad is gradient
    assert at > 20


def test_an_example_that_cannot_be_trained_on_is_warned_of():
    model = nn.Sequential(Trunk(), nn.BatchNorm1d(8))
    with pytest.warns(UserWarning, match=r"training mode is not proved.*more than 1 value per"):
        sd.apply(model, example=X[:1])
    sd.remove(model)
    sd.apply(model, example=X)


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class InFunction(Trunk):
    """Adds what a function with its own backward pass makes of a branch, in a loop."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + Sine.apply(block.f(x))
        return x


class InCheckpoint(Trunk):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block.f, x, use_reentrant=True)
        return x


class Noisy(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x) if self.training else x


class NoisyInFunction(InFunction):
    """Draws random numbers in training mode, in its branches and after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = Noisy()
        for block in self.blocks:
            block.f = nn.Sequential(nn.Linear(8, 8), Noisy())

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = self.noise(x + Sine.apply(block.f(x)))
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("model", [InFunction, InCheckpoint, NoisyInFunction])
@pytest.mark.parametrize("options", [{"drop_rate": 0.5}, {"gate": "sample"}, {"gate": "subset"}])
def test_a_gradient_that_is_lost_on_the_way_is_noticed(model, options):
    with pytest.raises(UnsupportedBlockError, match=r"no gradient .* autograd\.Function"):
        sd.apply(model(), example=X, **options)


class CheckpointsBranches(Trunk):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block.f, x, use_reentrant=False)
        return x


def test_a_subset_is_trained_in_the_proof():
    with pytest.raises(
        UnsupportedBlockError, match=r"half of the samples .*checkpoint\(layer, x\)"
    ):
        sd.apply(CheckpointsBranches(), example=X, gate="subset")
    for gate in ("batch", "sample"):
        sd.apply(CheckpointsBranches(), example=X, gate=gate)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("model", [InFunction, InCheckpoint])
@pytest.mark.parametrize("how", ["evaluation", "full depth", "forced and scaled"])
def test_a_gradient_that_is_lost_in_use_is_an_error_of_the_backward_pass(model, how):
    torch.manual_seed(0)
    net = model()
    handle = sd.apply(net, sd.Uniform(0.5), example=X)
    around = {
        "evaluation": contextlib.nullcontext,
        "full depth": handle.full_depth,
        "forced and scaled": partial(handle.forced, [True] * 3, scaled=True),
    }[how]
    with around():
        out = net.train(how != "evaluation")(X)
    x = net.stem(X)
    for block in net.blocks:
        x = x + 0.5 * (block.f(x).sin() if model is InFunction else block.f(x))
    torch.testing.assert_close(out, x)
    with pytest.raises(sd.errors.GateError, match=r"'blocks\.2.*no gradient .* autograd\.Function"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("model", [InFunction, InCheckpoint])
def test_a_gradient_that_is_not_lost_is_the_originals(model):
    torch.manual_seed(0)
    net = model()
    handle = sd.apply(net, example=X)
    with handle.forced([True, False, True]):
        net(X).square().sum().backward()
    x = net.stem(X)
    for n in (0, 2):
        f = net.blocks[n].f
        x = x + (f(x).sin() if model is InFunction else f(x))
    parameters = [*net.stem.parameters(), *net.blocks[0].parameters(), *net.blocks[2].parameters()]
    expected = torch.autograd.grad(x.square().sum(), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


class Shared:
    mask: Tensor | None = None


class KeepsMask(nn.Module):
    """The first of several branches keeps a mask for all of them."""

    def __init__(self, shared: Shared, first: bool, padding: bool) -> None:
        super().__init__()
        self.f, self.shared, self.first, self.padding = nn.Linear(8, 8), shared, first, padding

    def forward(self, x):
        if self.first:
            self.shared.mask = x.abs().sum(-1) > 0 if self.padding else x[..., 0] > 0
        return self.f(x) * self.shared.mask[..., None]


class Masked(nn.Module):
    def __init__(self, padding: bool) -> None:
        super().__init__()
        shared = Shared()
        self.branches = nn.ModuleList(KeepsMask(shared, n == 0, padding) for n in range(3))

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("samples", [1, 4])
def test_what_a_branch_leaves_for_other_blocks_is_noticed_on_other_inputs(padding, samples):
    x = torch.randn(samples, 5, 8)
    with pytest.raises(UnsupportedBlockError, match=r"left on an object in an earlier pass"):
        sd.apply(Masked(padding), example=x)
    handle = sd.apply(Masked(padding), example=x, exclude="branches.0")
    assert len(handle.blocks) == 2


def test_a_change_in_place_that_the_example_does_not_need_is_noticed():
    class Rectifies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(8, 8))

        def forward(self, x):
            return x + self.f(x)

    with pytest.raises(UnsupportedBlockError, match=r"give it inplace=False"):
        sd.apply(Rectifies(), example=torch.rand(4, 8))


class KeepsTerm(Plain):
    """Keeps a term of the loss on itself, not on a module of its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.term = torch.zeros(())

    def branch(self, x):
        y = torch.tanh(self.f(x))
        self.term = y.square().mean()
        return y

    def forward(self, x):
        return x + self.branch(x)


def test_a_term_that_a_block_keeps_for_the_loss_is_that_of_this_pass():
    torch.manual_seed(0)
    model = Trunk(KeepsTerm)
    handle = sd.apply(model, example=X)
    for gates in ([True] * 3, [True, False, True], [False] * 3):
        with handle.forced(gates):
            out = model(X)
        terms = [block.term for block in model.blocks]
        for term, is_open in zip(terms, gates, strict=True):
            assert (term.item() > 0) == is_open
        (out.sum() + sum(terms)).backward()


class Routed(nn.Module):
    """Runs blocks for the samples that are routed to them, if there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(3))

    def forward(self, x):
        for block, sign in zip(self.blocks, (1, -1, 1), strict=True):
            mine = (sign * x[:, 0] > 0).nonzero().flatten()
            if len(mine):
                x = x.index_copy(0, mine, block(x[mine]))
        return x


def test_other_inputs_that_take_another_path_are_left_out():
    torch.manual_seed(0)
    x = X.clone()
    x[:, 0] = x[:, 0].abs()
    handle = sd.apply(Routed(), example=x)
    assert [block.name for block in handle.blocks] == ["blocks.0", "blocks.2"]


class Reads(Plain):
    """Learned latents read the input, as in Perceiver."""

    def forward(self, latents, x):
        return latents + torch.softmax(self.f(latents) @ x.mT, -1) @ x


class Perceiver(Trunk):
    def __init__(self, expands: bool, loop: bool) -> None:
        super().__init__(Reads)
        self.latents = nn.Parameter(torch.randn(1, 3, 8))
        self.expands, self.loop = expands, loop

    def forward(self, x):
        latents = self.latents.expand(len(x), -1, -1) if self.expands else self.latents
        for block in self.blocks:
            if self.loop:
                latents = latents + torch.softmax(block.f(latents) @ x.mT, -1) @ x
            else:
                latents = block(latents, x)
        return latents.flatten(1)


@pytest.mark.parametrize("loop", [False, True])
def test_a_shortcut_that_is_broadcast_to_the_batch_is_noticed_on_one_sample(loop):
    torch.manual_seed(0)
    example = torch.randn(1, 5, 8)
    handle = sd.apply(Perceiver(True, loop), example=example)
    assert len(handle.blocks) == 3
    with pytest.raises(
        UnsupportedBlockError, match=r"'blocks\.0.*broadcast to the samples.*expand"
    ):
        sd.apply(Perceiver(False, loop), example=example)


class Field(Trunk):
    """Coordinates that all samples share, and a latent of each sample, as in neural fields."""

    def __init__(self, loop: bool) -> None:
        super().__init__(Conditioned)
        self.loop = loop

    def forward(self, coordinates, latent):
        h = coordinates
        for block in self.blocks:
            h = h + torch.sin(block.f(h) + latent) if self.loop else block(h, latent)
        return h


class Conditioned(Plain):
    def forward(self, h, latent):
        return h + torch.sin(self.f(h) + latent)


@pytest.mark.parametrize("loop", [False, True])
def test_a_shortcut_that_other_inputs_broadcast_is_refused_when_it_is_added_to(loop):
    model, coordinates = Field(loop), torch.randn(1, 5, 8)
    handle = sd.apply(model, example=(coordinates, torch.randn(1, 1, 8)))
    assert len(handle.blocks) == 3
    for mode in (True, False):
        with handle.forced([True] * 3, scaled=True):
            assert model.train(mode)(coordinates, torch.randn(1, 1, 8)).shape == (1, 5, 8)
            with pytest.raises(
                UnsupportedBlockError, match=r"\[4, 5, 8\], .* \[1, 5, 8\]: .*expand"
            ):
                model(coordinates, torch.randn(4, 1, 8))
    with handle.forced([True, False, True], scaled=True):
        assert model(torch.randn(4, 5, 8), torch.randn(4, 1, 8)).shape == (4, 5, 8)


class Promotes(Plain):
    """Ends its branch in float32, as a normalisation by weights of float32 does.

    Args:
        learned: whether by a factor that has the dtype of the model, as LayerScale has.
    """

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(8)) if learned else None

    def forward(self, x):
        f = self.f(x.to(self.f.weight.dtype))
        return x + (f.float() if self.factor is None else f * self.factor)


class PromotesInLoop(Trunk):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block.f(x.to(self.stem.weight.dtype)).float()
        return x


@pytest.mark.parametrize("model", [partial(Trunk, Promotes), PromotesInLoop])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_closed_block_has_the_dtype_of_the_sum(model, autocast):
    torch.manual_seed(0)
    net = model() if autocast else model().bfloat16()
    x = X if autocast else X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        handle = sd.apply(net, example=x)
        for gates in itertools.product([False, True], repeat=3):
            with handle.forced(gates):
                assert net(x).dtype == torch.float32
        with handle.forced([False, True, True]):
            out = net(x)
        h = net.stem(x).float()
        for block in net.blocks[1:]:
            h = h + block.f(h.to(net.stem.weight.dtype)).float()
        torch.testing.assert_close(out, h, rtol=0, atol=0)


def test_a_closed_block_casts_nothing_where_the_sum_does_not_either():
    net = Trunk(partial(Promotes, learned=True))
    with torch.autocast("cpu", torch.bfloat16):
        handle = sd.apply(net, example=X)
        with handle.forced([False] * 3):
            assert net(X).dtype == torch.float32
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        net.to(dtype)
        for gates in itertools.product([False, True], repeat=3):
            with handle.forced(gates):
                assert net(X.to(dtype)).dtype == dtype


def test_a_dtype_that_the_example_did_not_show_is_noticed_by_verify():
    net = Trunk(Promotes)
    sd.apply(net, example=X)
    refused = pytest.raises(UnsupportedBlockError, match=r"bfloat16, .*float32: .* autocast")
    with refused, torch.autocast("cpu", torch.bfloat16):
        sd.verify(net, X)


class TakesNoTokens(Trunk):
    def forward(self, x, tokens):
        return super().forward(x) + tokens.sum(-1, keepdim=True)


def test_an_input_may_be_empty():
    tokens = torch.zeros(len(X), 0, dtype=torch.long)
    assert len(sd.apply(TakesNoTokens(), example=(X, tokens)).blocks) == 3


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_do_not_run_during_the_proof(register):
    torch.manual_seed(0)
    model = Trunk()
    steps = []
    for parameter in model.parameters():
        getattr(parameter, register)(lambda _: steps.append(1))
    sd.apply(model, drop_rate=0.5, example=X)
    sd.verify(model, X, repeats=1)
    assert not steps
    model(X).sum().backward()
    assert steps


class InstallsHooks(Trunk):
    """Installs hooks in its first forward pass, to record what its blocks return."""

    installed = False

    def forward(self, x):
        if not self.installed:
            self.installed = True
            for block in self.blocks:
                block.register_forward_hook(lambda module, args, out: self.recorded.append(out))
        self.recorded: list[Tensor] = []
        return super().forward(x), list(self.recorded)


@pytest.mark.parametrize("called", [False, True])
def test_hooks_that_a_model_installs_while_it_runs_are_installed_once(called):
    torch.manual_seed(0)
    model = InstallsHooks()
    if called:
        model(X)
    sd.plan(model, X)
    handle = sd.apply(model, example=X)
    assert len(handle.blocks) == 3
    assert len(model(X)[1]) == 3


class Queue(nn.Module):
    """Keeps its outputs for the loss of the next step, as contrastive learning does."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.register_buffer("queue", torch.randn(4, 8))

    def forward(self, x):
        out = self.trunk(x)
        similar = out @ self.queue.T
        if self.training:
            self.queue = out.detach()
        return similar


@pytest.mark.parametrize("options", [{}, {"drop_rate": 0.5}])
def test_a_queue_for_the_next_step_is_no_reason_to_refuse(options):
    torch.manual_seed(0)
    model = Queue()
    before = model.queue.clone()
    assert len(sd.apply(model, example=X, **options).blocks) == 3
    assert torch.equal(model.queue, before)


class Masks(Plain):
    """Its branch is infinite where it does not count."""

    def forward(self, x):
        h = self.f(x.masked_fill(x.isinf(), 0))
        return x + h.masked_fill(torch.arange(8) == 3, -torch.inf)


def test_infinite_values_of_a_branch_are_no_reason_to_refuse():
    torch.manual_seed(0)
    model = nn.Sequential(Trunk(Masks), nn.Softmax(-1))
    assert model(X).isfinite().all()
    assert len(sd.apply(model, drop_rate=0.5, example=X).blocks) == 3


class Dormant(Plain):
    """Is left out in evaluation while its gain is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        if not self.training and self.gain.item() == 0:
            return x
        return x + self.gain * self.f(x)


def test_parameters_that_decide_the_path_are_left_as_they_are():
    torch.manual_seed(0)
    assert len(sd.apply(Trunk(Dormant), example=X).blocks) == 3


def add_relu(x, f):
    return torch.relu(x + f)


class AddsInAHelper(Plain):
    """As a ResNet whose helper function adds and activates: the gate is before the activation."""

    def forward(self, x):
        return add_relu(x, self.f(x))


class Normalises(Plain):
    """As nGPT: the sum is normalised in the call that adds."""

    def forward(self, x):
        return self.sum(x, self.f(x))

    def sum(self, x, f):
        return nn.functional.normalize(x + f, dim=-1)


@pytest.mark.parametrize("options", [{}, {"scale": "training"}, {"closed": "forward-only"}])
@pytest.mark.parametrize("block", [AddsInAHelper, Normalises])
def test_the_factor_of_a_gate_is_that_of_the_branch_alone(block, options):
    torch.manual_seed(0)
    model = Trunk(block).double()
    x = X.double().abs()
    plain, handle = copy.deepcopy(model), sd.apply(model, sd.Uniform(0.5), example=x, **options)

    def by_hand(factors):
        out = plain.stem(x)
        for each, factor in zip(plain.blocks, factors, strict=True):
            added = out + factor * each.f(out)
            out = (
                torch.relu(added)
                if block is AddsInAHelper
                else nn.functional.normalize(added, dim=-1)
            )
        return out

    whole = 0.5 if not options else 1.0
    torch.testing.assert_close(model.eval()(x), by_hand([whole] * len(plain.blocks)))
    if "closed" in options:
        return
    for gates in itertools.product([False, True], repeat=len(plain.blocks)):
        with handle.forced(gates):
            factors = [gate / 0.5 if options else float(gate) for gate in gates]
            torch.testing.assert_close(model.train()(x), by_hand(factors))


class LeavesAMask(Plain):
    """In training mode, the first branch draws no mask where it finds one, and others use it."""

    def forward(self, x, context):
        return x + self.branch(x, context)

    def branch(self, x, context):
        f = torch.relu(self.f(x))
        if self.training:
            if "mask" not in context:
                context["mask"] = (f > 0.1).to(f)
            f = f * context["mask"]
        return f


class WithContext(Trunk):
    """The context is made in each pass, or kept from the pass before where no branch leaves one."""

    def __init__(self, keeps: bool) -> None:
        super().__init__(LeavesAMask)
        self.keeps, self.context = keeps, {}

    def forward(self, x, gates=None):
        x, old = self.stem(x), self.context
        context: dict[str, Tensor] = {}
        for n, block in enumerate(self.blocks):
            # By hand, all branches run, and are multiplied.
            x = block(x, context) if gates is None else x + gates[n] * block.branch(x, context)
            if self.keeps and "mask" not in context and "mask" in old:
                context = old
        self.context = context
        return x


@pytest.mark.parametrize("keeps", [False, True])
def test_what_branches_leave_for_others_in_training_mode_alone_is_proved_too(keeps):
    torch.manual_seed(0)
    model = WithContext(keeps)
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    for step, gates in enumerate(itertools.product([False, True], repeat=3)):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        with handle.forced(gates):
            torch.testing.assert_close(model.train()(x), plain.train()(x, gates))


class AddsInTraining(Plain):
    """Training mode alone adds, in a helper that activates the sum."""

    def forward(self, x):
        return add_relu(x, self.f(x)) if self.training else torch.relu(x)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Plain(), Plain()])
        self.later = nn.ModuleList([AddsInTraining(), AddsInTraining()])

    def forward(self, x):
        for block in [*self.blocks, *self.later]:
            x = block(x)
        return x


def test_the_factor_is_proved_for_blocks_of_training_mode_alone_too():
    torch.manual_seed(0)
    model, x = Both(), X.abs()
    plain, handle = (
        copy.deepcopy(model),
        sd.apply(model, sd.Uniform(0.5), example=x, scale="training"),
    )
    assert len(handle.blocks) == 4
    for gates in itertools.product([False, True], repeat=4):
        expected = x
        for block, gate in zip([*plain.blocks, *plain.later], gates, strict=True):
            if isinstance(block, AddsInTraining):
                expected = torch.relu(expected + 2 * gate * block.f(expected))
            else:
                expected = expected + 2 * gate * torch.relu(block.f(expected))
        with handle.forced(gates):
            torch.testing.assert_close(model.train()(x), expected)


class NoisyBackward(nn.Module):
    """Its gradient differs from pass to pass, as atomic sums on a GPU do."""

    def __init__(self):
        super().__init__()
        self.source = torch.Generator().manual_seed(0)

    def forward(self, x):
        y = x * 1
        if y.requires_grad:
            y.register_hook(lambda g: g * (1 + 1e-3 * torch.randn(g.shape, generator=self.source)))
        return y


def test_a_backward_pass_that_differs_from_pass_to_pass_is_no_reason_to_refuse():
    model = nn.Sequential(Trunk(), NoisyBackward())
    assert len(sd.apply(model, example=X).blocks) == len(sd.apply(Trunk(), example=X).blocks)


def test_an_original_that_is_not_the_model_of_before_is_noticed(monkeypatch):
    @contextlib.contextmanager
    def original(gated, *_):
        weight = gated.model.stem.weight
        weight.data.mul_(2)
        try:
            yield
        finally:
            weight.data.div_(2)

    monkeypatch.setattr(Gated, "original", original)
    with pytest.raises(UnsupportedBlockError, match="is not itself again when its gates are taken"):
        sd.apply(Trunk(), example=X)
