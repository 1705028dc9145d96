import copy
import re
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery.applied import applied_inside


def small() -> CifarResNet:
    return CifarResNet(8, classes=3, init="he", seed=1)


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def is_untouched(model: nn.Module) -> bool:
    """Whether `model` has no hook, and its blocks no gates."""
    return not any(
        module._forward_hooks or module._forward_pre_hooks or getattr(module, "gates", None)
        for module in model.modules()
    )


def test_names_and_state_dict_keys_stay() -> None:
    model = small()
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    keys = list(model.state_dict())
    sd.apply(model)
    model(images())
    assert [name for name, _ in model.named_parameters()] == parameters
    assert [name for name, _ in model.named_buffers()] == buffers
    assert list(model.state_dict()) == keys
    small().load_state_dict(model.state_dict())


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("scale", ["inference", "training"])
def test_with_survival_probability_1_nothing_changes(gate, scale) -> None:
    model, plain = small(), small()
    sd.apply(model, sd.Uniform(1.0), gate=gate, scale=scale)
    for training in (True, False):
        out = model.train(training)(images())
        if gate == "batch" or not training:
            assert torch.equal(out, plain.train(training)(images()))
        else:
            torch.testing.assert_close(out, plain.train(training)(images()))


def test_linear_decay_to_a_half_is_the_default() -> None:
    handle = sd.apply(small())
    assert handle.survival == pytest.approx((1 - 0.5 / 3, 1 - 1 / 3, 0.5))
    assert (handle.gate, handle.scale, handle.skipped, handle.seed) == (
        "batch",
        "inference",
        "paper",
        0,
    )


def test_blocks_are_numbered_from_input_to_output() -> None:
    model = small()
    handle = sd.apply(model)
    order: list[nn.Module] = []
    for unit in model.blocks:
        unit.register_forward_hook(lambda unit, *_: order.append(unit))
    model.eval()(images())
    assert order == list(model.blocks)
    assert [model.get_submodule(block.name) for block in handle.blocks] == order


@pytest.mark.parametrize("copied", [False, True])
def test_remove_gives_the_original_model_back(copied: bool) -> None:
    model, plain = small(), small()
    sd.apply(model, sd.Uniform(0.3))
    if copied:
        original, model = model, copy.deepcopy(model)
        assert not is_untouched(model)
    sd.remove(model)
    assert is_untouched(model)
    assert vars(model).keys() == vars(plain).keys()
    for training in (True, False):
        assert torch.equal(model.train(training)(images()), plain.train(training)(images()))
    if copied:
        assert not is_untouched(original)
        original(images())
        sd.remove(original)
        assert is_untouched(original)


class Forwarding(nn.Module):
    """A wrapper that has the attributes of the model inside it, as those of peft and Fabric."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@pytest.mark.parametrize("wrap", [Forwarding, partial(torch.compile, backend="eager")])
def test_a_wrapper_that_forwards_attributes_is_no_second_model(wrap) -> None:
    model = small()
    handle = sd.apply(model)
    wrapped = wrap(model)
    assert sd.handle_of(wrapped) is handle
    assert list(applied_inside(wrapped).values()) == [model]
    assert sd.verify(wrapped, images(), repeats=1).blocks == 3
    sd.remove(wrapped)
    assert is_untouched(wrapped)
    assert not applied_inside(wrapped)
    assert torch.equal(model(images()), small()(images()))


def test_remove_keeps_what_was_learned() -> None:
    model = small()
    sd.apply(model)
    with torch.no_grad():
        model.head.weight.fill_(7)
    sd.remove(model)
    assert bool((model.head.weight == 7).all())


def test_a_model_can_be_applied_again_after_remove() -> None:
    model = small()
    sd.apply(model, sd.Uniform(0.3))
    sd.remove(model)
    handle = sd.apply(model, sd.Uniform(0.8))
    model(images())
    assert handle.survival == (0.8,) * 3


def test_applying_twice_names_the_block_and_the_remedy() -> None:
    model = small()
    handle = sd.apply(model)
    with pytest.raises(
        sd.errors.ApplyError, match=r"block 'blocks\.0' .*already: sd\.remove\(model\)"
    ):
        sd.apply(model)
    model(images())
    assert handle.step == 1


def test_applying_around_or_inside_an_applied_model_is_an_error() -> None:
    inside = small()
    sd.apply(inside)
    around = nn.Sequential(sd.Residual(nn.Identity()), inside)
    with pytest.raises(sd.errors.ApplyError, match=r"block '1\.blocks\.0' "):
        sd.apply(around)
    assert around[0].gates is None
    assert not around._forward_hooks
    with pytest.raises(
        sd.errors.ApplyError, match=r"block '0' has stochastic depth already: sd\.remove"
    ):
        sd.apply(inside.blocks)
    with pytest.raises(sd.errors.ApplyError, match="block 'Residual' "):
        sd.apply(inside.blocks[0])


def test_a_model_without_residual_units_is_an_error_not_a_silent_no_op() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(sd.errors.ApplyError, match=r"Sequential.*nothing can be skipped.*example="):
        sd.apply(model)
    assert is_untouched(model)


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("gate", "'batch', 'sample', 'subset'"),
        ("scale", "'inference', 'training'"),
        ("skipped", "'paper', 'freeze'"),
        ("balance", "True, False"),
    ],
)
def test_an_unknown_setting_lists_the_known_ones(setting: str, known: str) -> None:
    model = small()
    with pytest.raises(sd.errors.ApplyError) as error:
        sd.apply(model, **{setting: "row"})
    assert str(error.value) == f"{setting}='row': choose one of {known}"
    assert is_untouched(model)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (sd.Uniform(0.0), "gives block 1 of 3 the survival probability 0.0"),
        (sd.LinearDecay(-0.1), "gives block 3 of 3 the survival probability -0.1"),
        (sd.Uniform(1.5), "gives block 1 of 3 the survival probability 1.5"),
        (0.5, "survival=0.5 is not a rule"),
        (sd.LinearDecay, "survival=LinearDecay is a class: give an object of it"),
    ],
)
def test_a_bad_probability_leaves_the_model_untouched(rule, reason) -> None:
    model = small()
    with pytest.raises(sd.errors.SurvivalError, match=re.escape(reason)):
        sd.apply(model, rule)
    assert is_untouched(model)
    sd.apply(model)


@pytest.mark.parametrize("function", [sd.apply, sd.plan])
@pytest.mark.parametrize("rate", ["0.5", 1.0, -0.1, False])
def test_a_bad_drop_rate_is_named(function, rate) -> None:
    named = f"drop_rate={rate!r}: it must be a number, at least 0 and below 1"
    with pytest.raises(sd.errors.SurvivalError, match=named):
        function(small(), drop_rate=rate, example=images())


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(sd.errors.ApplyError, match=r"an nn\.Module, this is Tensor"):
        sd.apply(torch.zeros(3))


def test_removing_what_was_not_applied_is_an_error() -> None:
    model = small()
    with pytest.raises(sd.errors.ApplyError, match="CifarResNet has no stochastic depth"):
        sd.remove(model)
    sd.apply(model)
    with pytest.raises(sd.errors.ApplyError, match="Sequential has no stochastic depth"):
        sd.remove(model.blocks)
    sd.remove(model)
    with pytest.raises(sd.errors.ApplyError, match="CifarResNet has no stochastic depth"):
        sd.remove(model)


def test_residual_units_can_be_left_as_they_are() -> None:
    model = small()
    blocks = len(sd.apply(model).survival)
    sd.remove(model)
    handle = sd.apply(model, exclude=["blocks.1"])
    assert len(handle.survival) == blocks - 1
    assert model.blocks[1].gates is None
    model(images()).sum().backward()


def test_a_lower_bound_is_for_subsets_alone() -> None:
    with pytest.raises(sd.errors.ApplyError, match=r"min_samples=2.*subset"):
        sd.apply(CifarResNet(8), min_samples=2)
    with pytest.raises(
        sd.errors.ApplyError, match=r"min_samples=-1: give a number of samples, 0 or more"
    ):
        sd.apply(CifarResNet(8), gate="subset", min_samples=-1)
    model = CifarResNet(8)
    handle = sd.apply(model, sd.Uniform(0.05), gate="subset", min_samples=2, scale="training")
    for _ in range(5):
        model.train()(torch.randn(4, 3, 32, 32))
        assert handle.gates.sum(1).min() >= 2


def test_survival_by_name_and_stack_by_stack() -> None:
    model = CifarResNet(20)
    names = [block.name for block in sd.apply(model).blocks]
    sd.remove(model)
    assert sd.apply(model, {names[3]: 0.25}).survival == (1, 1, 1, 0.25, 1, 1, 1, 1, 1)
    sd.remove(model)
    both = nn.ModuleDict({"encoder": CifarResNet(8), "decoder": CifarResNet(8)})
    handle = sd.apply(both, sd.LinearDecay(0.4), stacks=["encoder", "decoder"])
    assert handle.survival == pytest.approx((0.8, 0.6, 0.4) * 2)
    with pytest.raises(
        sd.errors.SurvivalError, match=r"no drop path with a rate above 0; build it with one"
    ):
        sd.apply(model, "own")


def test_a_drop_rate_is_linear_decay_to_1_less_it_in_the_scaling_of_other_libraries() -> None:
    handle = sd.apply(small(), drop_rate=0.3)
    assert handle.survival == pytest.approx((0.9, 0.8, 0.7))
    assert handle.scale == "training"
    assert sd.apply(small(), drop_rate=0.3, scale="inference").scale == "inference"
    assert sd.apply(small()).scale == sd.apply(small(), sd.Uniform(0.7)).scale == "inference"
    planned = sd.plan(small(), images(), drop_rate=0.3)
    assert [block.survival for block in planned.blocks] == pytest.approx([0.9, 0.8, 0.7])


@pytest.mark.parametrize("function", [sd.apply, sd.plan])
def test_a_drop_rate_is_given_instead_of_survival(function) -> None:
    with pytest.raises(
        sd.errors.ApplyError, match=r"drop_rate=0\.1 and survival=.*: give one of them"
    ):
        function(small(), survival=sd.LinearDecay(), drop_rate=0.1, example=images())


def test_weights_of_constant_depth_evaluate_the_same_under_a_drop_rate() -> None:
    model = small()
    with torch.no_grad():
        before = model.eval()(images())
        sd.apply(model, drop_rate=0.5)
        assert torch.equal(model.eval()(images()), before)


class Trained(nn.Module):
    """A network of each kind of normalisation, as after a step of training."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.block = sd.Residual(nn.Sequential(norm, nn.Linear(4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm])
def test_trained_weights_are_not_scaled_without_a_word(norm) -> None:
    model = Trained(norm(4))
    sd.apply(model)
    sd.remove(model)
    model(torch.randn(8, 4))
    with torch.no_grad():
        model.block.branch[0].weight.add_(torch.randn(4))
    with pytest.warns(UserWarning, match=r'scale="training" to fine-tune weights'):
        sd.apply(model)
    silent = [
        {"scale": "inference"},
        {"scale": "training"},
        {"drop_rate": 0.1},
        {"survival": sd.Uniform(1.0)},
    ]
    for options in silent:
        sd.remove(model)
        sd.apply(model, **options)


def test_statistics_alone_say_that_weights_were_trained() -> None:
    model = Trained(nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    with pytest.warns(UserWarning, match="the weights look trained"):
        sd.apply(model)
    sd.remove(model)
    with pytest.warns(UserWarning, match="the weights look trained"):
        sd.apply(model, lambda block, blocks, step: 1 - min(1, step / 100) / 2)


def test_where_warnings_are_errors_the_model_is_applied_nevertheless_and_can_be_restored() -> None:
    model = Trained(nn.BatchNorm1d(4))
    model(torch.randn(8, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the weights look trained"):
            sd.apply(model)
    sd.remove(model)
    sd.apply(model, scale="training")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.f = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * torch.tanh(self.f(x))


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@pytest.mark.parametrize("verb", ["remove", "verify"])
def test_classes_that_others_put_on_top_of_a_block_stay(verb: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(*(Scaled() for _ in range(3))), torch.randn(2, 4)
    sd.apply(model, sd.Uniform(1.0), example=x)
    for block in model:
        parametrize.register_parametrization(block, "gain", Doubled())
    expected = model.eval()(x)
    sd.remove(model) if verb == "remove" else sd.verify(model, x, repeats=1)
    assert torch.equal(model(x), expected)
    assert all(isinstance(block, Scaled) for block in model)
    assert all(parametrize.is_parametrized(block, "gain") for block in model)
    if verb == "remove":
        assert [type(block).__mro__[1] for block in model] == [Scaled] * 3
        for block in model:
            parametrize.remove_parametrizations(block, "gain")
        assert [type(block) for block in model] == [Scaled] * 3


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda model: torch.compile(model, backend="eager"), "then sd.compile_blocks"),
        (lambda model: nn.Sequential(torch.compile(model[0], backend="eager")), "sd.compile_bl"),
        (
            lambda model: nn.Sequential(torch.jit.script(model[0].f), model[1]),
            "script the model after sd.fo",
        ),
        (torch.fx.symbolic_trace, "trace the model after sd.fold; for features"),
    ],
)
@pytest.mark.parametrize("verb", [sd.apply, sd.plan])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_is_compiled_scripted_or_traced_is_refused_with_the_remedy(
    verb, change, remedy
) -> None:
    model, x = nn.Sequential(Scaled(), Scaled()), torch.randn(2, 4)
    with pytest.raises(sd.errors.ApplyError, match=remedy):
        verb(change(model), example=x)


def test_a_nested_tensor_is_refused_as_an_example_and_taken_in_training() -> None:
    parts = [torch.randn(3, 4), torch.randn(5, 4)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    model = nn.Sequential(Shifted(4), Shifted(4))
    for verb in (sd.plan, sd.apply):
        with pytest.raises(sd.errors.ApplyError, match="to_padded_tensor"):
            verb(model, example=nested)
    handle = sd.apply(model, sd.Uniform(0.5), example=torch.nested.to_padded_tensor(nested, 0.0))
    with pytest.raises(sd.errors.ApplyError, match="to_padded_tensor"):
        sd.verify(model, nested)
    with pytest.raises(sd.errors.ApplyError, match="to_padded_tensor"):
        sd.truncate(model, [0], nested)
    model.train()
    seen = set()
    for _ in range(8):
        out = model(nested)
        now = parts
        for block, is_open in zip(model, handle.gates.tolist(), strict=True):
            now = [x + block.branch(x).tanh() if is_open else x for x in now]
        assert all(torch.allclose(a, b) for a, b in zip(out.unbind(), now, strict=True))
        seen.add(tuple(handle.gates.tolist()))
    assert len(seen) > 1


class Shifted(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x).tanh()


def test_a_module_that_is_made_anew_from_a_class_with_gates_has_none() -> None:
    model, x = nn.Sequential(Shifted(), Shifted()), torch.randn(2, 3)
    sd.apply(model, example=x)
    new = type(model[0])(width=3)
    assert type(new) is Shifted
    assert torch.equal(new(x), x + new.branch(x).tanh())
    sd.apply(nn.Sequential(new), example=x)


def test_nothing_of_the_library_is_put_on_the_default_device() -> None:
    model, x = nn.Sequential(Shifted(), Shifted()), torch.randn(4, 3)
    with torch.device("meta"):
        handle = sd.apply(model, sd.Uniform(0.5), example=x, gate="subset")
        model(x).sum().backward()
        sd.verify(model, x)
        assert handle.gates.device == torch.device("cpu")
    assert all(p.grad is None or p.grad.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("example", [3, torch.randn(4, 5), (torch.randn(4, 3),) * 2])
@pytest.mark.parametrize("verb", [sd.apply, sd.plan])
def test_an_example_that_does_not_fit_is_told_with_what_would(verb, example) -> None:
    model = nn.Sequential(Shifted(), Shifted())
    with pytest.raises(sd.errors.ExampleError, match=r"does not run on the example .*example= is"):
        verb(model, example=example)
    assert is_untouched(model)


def test_a_model_that_fails_is_run_once_and_its_error_shown_once() -> None:
    calls = []

    class Fails(Shifted):
        def forward(self, x):
            calls.append(1)
            raise RuntimeError("mine")

    with pytest.raises(sd.errors.ExampleError) as caught:
        sd.plan(Fails(), torch.randn(4, 3))
    assert len(calls) == 1
    assert caught.value.__context__.__context__ is None


@pytest.mark.parametrize("verb", [sd.apply, sd.plan])
def test_lazy_layers_are_to_be_run_once_before(verb) -> None:
    model, x = nn.Sequential(Shifted(), Shifted(), nn.LazyLinear(2)), torch.randn(4, 3)
    with pytest.raises(sd.errors.ExampleError, match="run the model once, before this"):
        verb(model, example=x)
    model(x)
    verb(model, example=x)
