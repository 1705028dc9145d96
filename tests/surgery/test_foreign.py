"""`sd.apply` on models that know nothing of this library: every form an addition comes in."""

import copy
import functools
import itertools
import pickle
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.surgery import adapters
from stochastic_depth.surgery.adapters import registered
from support.blocks import (
    ONE_ADDITION,
    WIDTH,
    Base,
    Decorated,
    InPlace,
    Left,
    PreActivation,
    Projection,
    Right,
    SaysHow,
    Scaled,
    WithSuper,
    X,
    network,
    require_surviving_network,
    skip_or_sum,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ONE_ADDITION)
def test_every_pattern_of_gates_gives_outputs_and_gradients_of_the_surviving_network(kind):
    original, model = network(kind), network(kind)
    handle = sd.apply(model, sd.LinearDecay(0.5), example=X)
    assert len(handle.survival) == 3
    require_surviving_network(original, model, handle)


@pytest.mark.parametrize("kind", ONE_ADDITION)
@pytest.mark.parametrize("scale", ["inference", "training"])
def test_evaluation_multiplies_the_branch_by_p(kind, scale):
    original, model = network(kind).eval(), network(kind)
    sd.apply(model, sd.Uniform(0.25), example=X, scale=scale)
    factor = 0.25 if scale == "inference" else 1.0
    h = original[0](X)
    for block in list(original)[1:]:
        if kind is InPlace:
            h = F.relu(h + factor * block.two(torch.tanh(block.one(h))))
        elif kind is Projection:
            h = F.relu(block.project(h) + factor * block.two(torch.tanh(block.one(h))))
        else:
            h = h + factor * (block(h) - h)
    torch.testing.assert_close(model.eval()(X), h, rtol=1e-10, atol=1e-12)


def test_gates_for_single_samples_mask_each_sample():
    original, model = network(Left), network(Left)
    handle = sd.apply(model, sd.Uniform(0.5), example=X, gate="sample")
    out = model.train()(X)
    for sample in range(len(X)):
        h = original[0](X[sample])
        for block, is_open in zip(list(original)[1:], handle.gates[:, sample], strict=True):
            h = block(h) if is_open else h
        torch.testing.assert_close(out[sample], h, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", ["inference", "training"])
@pytest.mark.parametrize("kind", ONE_ADDITION)
def test_the_subset_gate_runs_branches_on_the_drawn_samples_only(kind, scale):
    original, model = network(kind), network(kind)
    handle = sd.apply(model, sd.Uniform(0.5), example=X, gate="subset", scale=scale)
    seen = []
    for block in list(model)[1:]:
        block.one.register_forward_hook(lambda m, args, out: seen.append(len(out)))
    out = model.train()(X)
    drawn = handle.gates
    assert 0 < drawn.sum() < drawn.numel()
    assert set(seen) == {n for n in drawn.sum(1).tolist() if n}
    h, factor = original[0](X), 1.0 if scale == "inference" else 2.0
    for block, keep in zip(list(original)[1:], drawn, strict=True):
        post = F.relu if kind in (InPlace, Projection) else lambda x: x
        if kind in (InPlace, Projection):
            short = block.project(h) if kind is Projection else h
            summed = short + factor * block.two(torch.tanh(block.one(h)))
        else:
            short, summed = h, h + factor * (block(h) - h)
        h = post(torch.where(keep[:, None], summed, short))
    torch.testing.assert_close(out, h, rtol=1e-10, atol=1e-12)
    for result in (out, h):
        result.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), original.parameters(), strict=True):
        expected = torch.zeros_like(p) if q.grad is None else q.grad
        mine = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12, msg=name)


class PreNorm(nn.Module):
    """Two additions, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Base(), Base()

    def forward(self, x):
        x = x + self.a.f(x)
        return x + self.b.f(x)


class Parallel(PreNorm):
    def forward(self, x):
        return x + self.a.f(x) + self.b.f(x)


@pytest.mark.parametrize("kind", [PreNorm, Parallel])
def test_two_additions_share_a_coin_or_have_one_each(kind):
    assert len(sd.apply(network(kind), example=X).survival) == 3
    original, model = network(kind), network(kind)
    handle = sd.apply(model, example=X, granularity="unit")
    assert len(handle.survival) == 6
    for pattern in itertools.product((False, True), repeat=6):
        with handle.forced(pattern):
            out = model.forward(X)
        h = original[0](X)
        for n, block in enumerate(list(original)[1:]):
            first, second = pattern[2 * n : 2 * n + 2]
            a = block.a.f(h) if first else 0
            after = h + a
            h = after + (block.b.f(after if kind is PreNorm else h) if second else 0)
        torch.testing.assert_close(out, h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Left, InPlace, WithSuper])
def test_class_keys_copy_and_pickle_stay(kind):
    model = network(kind)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    expected = network(kind).eval()(X)
    sd.apply(model, sd.Uniform(1.0), example=X)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == names
    assert all(
        isinstance(block, kind) and type(block).__name__ == kind.__name__
        for block in list(model)[1:]
    )
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(X), expected)
        other.train()(X).sum().backward()


def test_remove_gives_the_original_back_with_its_new_weights():
    model = network(InPlace)
    types = [type(m) for m in model.modules()]
    sd.apply(model, example=X)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    sd.remove(model)
    assert [type(m) for m in model.modules()] == types
    original = network(InPlace)
    original.load_state_dict(model.state_dict())
    assert torch.equal(model.train()(X), original.train()(X))
    assert not any("stochastic" in key for m in model.modules() for key in vars(m))


def test_skipped_parameters_get_zero_gradients_or_none():
    for skipped in ("paper", "freeze"):
        model = network(Scaled)
        handle = sd.apply(model, sd.Uniform(0.3), example=X, skipped=skipped)
        for step in range(6):
            model.zero_grad()
            model(X).sum().backward()
            for block, is_open in zip(list(model)[1:], handle.gates.tolist(), strict=True):
                for p in (block.gamma, block.one.weight, block.norm.bias, block.two.bias):
                    if is_open:
                        assert p.grad.abs().sum() > 0
                    elif skipped == "paper":
                        assert torch.equal(p.grad, torch.zeros_like(p)), step
                    else:
                        assert p.grad is None
                assert block.project.weight.grad is None


def test_what_a_projection_shares_with_the_branch_still_runs():
    block = PreActivation("project").double()
    model = nn.Sequential(nn.Linear(4, WIDTH), block).double()
    handle = sd.apply(model, example=X)
    with handle.forced([False]):
        out = model.forward(X)
    torch.testing.assert_close(out, block.project(block.norm(model[0](X))))


def test_decorators_are_kept():
    model = network(Decorated)
    counted = [vars(block).get("calls") for block in model]
    sd.apply(model, example=X)
    assert [vars(block).get("calls") for block in model] == counted  # the look has left nothing
    model(X)
    before = [block.calls for block in list(model)[1:]]
    model(X)
    assert [block.calls for block in list(model)[1:]] == [n + 1 for n in before]


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if self.training and self.drop_prob > 0:
            raise AssertionError("both at once")
        return x


class WithDropPath(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath(0.3)

    def forward(self, x):
        return x + self.drop_path(self.f(x))


def test_a_models_own_drop_path_is_taken_over_until_removed():
    model = network(WithDropPath)
    sd.apply(model, sd.Uniform(1.0), example=X)
    model.train()(X)
    sd.remove(model)
    assert {block.drop_path.drop_prob for block in list(model)[1:]} == {0.3}
    with pytest.raises(AssertionError, match="both at once"):
        model.train()(X)


class Subtracts(Base):
    def forward(self, x):
        return x - self.f(x)


class Concatenates(Base):
    def forward(self, x):
        return torch.cat([x, self.f(x)], dim=-1)[..., :WIDTH]


class Highway(Base):
    def forward(self, x):
        t = torch.sigmoid(self.project(x))
        return t * self.f(x) + (1 - t) * x


class Bends(Base):
    def forward(self, x):
        x = self.one(x)
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))


@pytest.mark.parametrize("kind", [Subtracts, Concatenates, Highway, Bends])
def test_what_is_not_residual_is_said_to_be_none(kind):
    with pytest.raises(sd.errors.ApplyError, match="no residual block found in Sequential"):
        sd.apply(network(kind), example=X)


class Asks(Base):
    """Its branch is needed for the input of the next one, too."""

    def forward(self, x):
        y = self.f(x)
        return torch.cat([x + y, y[:, :0]], 1) * (1 + y.mean().square())


def test_a_block_that_cannot_be_skipped_is_named_and_the_model_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), Asks()).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    types, before = [type(m) for m in model.modules()], model(X)
    with pytest.raises(
        sd.errors.UnsupportedBlockError, match="needed for more than the addition"
    ) as e:
        sd.apply(model, example=X)
    assert "exclude=" in str(e.value)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(X), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    handle = sd.apply(model, example=X, exclude=["2"])
    assert len(handle.survival) == 1


class Recomputing(nn.Module):
    """Wraps each of its blocks in activation checkpointing."""

    def __init__(self, reentrant: bool, recompute: bool) -> None:
        super().__init__()
        self.body = network(InPlace, 5)
        self.reentrant, self.recompute = reentrant, recompute

    def forward(self, x):
        for block in self.body:
            if self.recompute and x.requires_grad:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_under_the_same_gates(reentrant):
    plain, model = Recomputing(reentrant, False), Recomputing(reentrant, True)
    depths = [sd.apply(m, sd.LinearDecay(0.3), example=X) for m in (plain, model)]
    for step in range(8):
        for m in (plain, model):
            m.zero_grad()
            m(X * (step + 1)).square().sum().backward()
        assert torch.equal(depths[0].gates, depths[1].gates)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)


def test_exclude_by_name_class_and_a_name_that_matches_nothing():
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), Right(), Left()).double()
    assert len(sd.apply(model, example=X, exclude=["1"]).survival) == 2
    sd.remove(model)
    assert [block.name for block in sd.apply(model, example=X, exclude=[Left]).blocks] == ["2"]
    sd.remove(model)
    with pytest.raises(sd.errors.ApplyError, match="exclude='9' matches no module"):
        sd.apply(model, example=X, exclude=["9"])


def test_applying_disturbs_nothing():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), Left(), nn.Dropout(0.5))
    model.double()[3].eval()
    model(X).sum().backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    sd.apply(model, example=X)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(map(torch.equal, gradients, after))


def test_examples_are_a_tensor_a_tuple_or_a_mapping():
    for example in (X, (X,), {"input": X}):
        assert len(sd.apply(network(Left), example=example).survival) == 3


def test_residual_units_and_foreign_blocks_are_numbered_as_they_run():
    torch.manual_seed(0)
    unit = sd.Residual(nn.Sequential(nn.Linear(WIDTH, WIDTH)))
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), unit, Left()).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    assert [block.name for block in handle.blocks] == ["1", "2", "3"]
    model(X).sum().backward()


class KeepsOutput(nn.Module):
    """Rewritten, its first layer would always run, so that it is found again and deferred."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.output = self.first(x)
        return x + self.second(self.output)


def test_a_generator_of_names_chooses_the_blocks_however_often_they_are_found():
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), KeepsOutput(), Left()).double()
    plan = sd.plan(model, X, exclude=iter(["1"]))
    assert [(each.name, each.mechanism) for each in plan.blocks] == [
        ("2", "deferred"),
        ("3", "slice"),
    ]
    handle = sd.apply(model, example=X, exclude=iter(["1"]))
    assert [block.name for block in handle.blocks] == ["2", "3"]


def test_a_predicate_or_classes_choose_the_blocks():
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), Right(), Left()).double()

    def names(**choice):
        handle = sd.apply(model, example=X, **choice)
        sd.remove(model)
        return [block.name for block in handle.blocks]

    assert names(include=Left) == ["1", "3"]
    assert names(include=["2", "3"]) == ["2", "3"]
    assert names(include=[Left], exclude="3") == ["1"]
    assert names(exclude=lambda name, module: name == "1") == ["2", "3"]
    assert names(include=model[2]) == names(include=[model[2]], exclude=None) == ["2"]
    assert names(exclude=(model[1], "3")) == ["2"]
    assert names(include=nn.ModuleList([model])[0]) == ["1", "2", "3"]
    with pytest.raises(sd.errors.ApplyError, match=r"exclude=Left matches no module"):
        sd.apply(model, example=X, exclude=Left())
    with pytest.raises(sd.errors.ApplyError, match=r"include=.* matches no module"):
        sd.apply(model, example=X, include=[InPlace])
    with pytest.raises(sd.errors.ApplyError, match="include names no module at all: leave it out"):
        sd.apply(model, example=X, include=[])


class Layer(nn.Module):
    """Its additions are in two modules, as in T5 and BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Left(), Right()

    def forward(self, x):
        return self.second(self.first(x))


def test_the_units_of_a_repeated_block_share_a_coin():
    model = network(Layer)
    handle = sd.apply(model, example=X)
    assert [block.name for block in handle.blocks] == ["1", "2", "3"]
    with handle.forced([False] * 3):
        assert torch.equal(model.forward(X), model[0](X))
    sd.remove(model)
    names = [block.name for block in sd.apply(model, example=X, granularity="unit").blocks]
    assert names == ["1.first", "1.second", "2.first", "2.second", "3.first", "3.second"]


def test_two_calls_of_one_shared_module_have_a_coin_each():
    torch.manual_seed(0)
    shared = Left()
    original = nn.Sequential(nn.Linear(4, WIDTH), shared, nn.Tanh(), shared).double()
    model = copy.deepcopy(original)
    handle = sd.apply(model, example=X)
    assert [block.name for block in handle.blocks] == ["1", "1"]
    model.train()
    seen = set()
    for _ in range(24):
        out = model(X)
        first, second = handle.gates.tolist()
        expected = original[0](X)
        expected = torch.tanh(shared(expected) if first else expected)
        expected = shared(expected) if second else expected
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        seen.add((first, second))
    assert len(seen) == 4


def patched(block: nn.Module) -> nn.Module:
    block.forward = MethodType(lambda self, x: x + 2 * self.f(x), block)
    return block


def test_a_forward_method_set_on_the_instance_is_called_under_its_gate():
    torch.manual_seed(0)
    original = nn.Sequential(nn.Linear(4, WIDTH), Left(), patched(Left()), patched(Left())).double()
    model = copy.deepcopy(original)
    handle = sd.apply(model, example=X)
    assert [block.name for block in handle.blocks] == ["1", "2", "3"]
    sd.verify(model, X, repeats=1)
    for made, of in ((model, handle), copy.deepcopy((model, handle))):
        for gates in itertools.product([True, False], repeat=3):
            expected = original[0](X)
            for block, times, is_open in zip(original[1:], (1, 2, 2), gates, strict=True):
                expected = expected + times * block.f(expected) if is_open else expected
            with of.forced(gates):
                torch.testing.assert_close(made.train()(X), expected, rtol=1e-12, atol=0)
    own = vars(original[2])["forward"].__func__
    sd.remove(model)
    assert vars(model[2])["forward"].__func__ is own
    assert torch.equal(model(X), original(X))


def test_a_forward_method_replaced_after_sd_apply_is_warned_of_with_the_remedy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), Left()).double()
    sd.apply(model, example=X)
    patched(model[2])
    with pytest.warns(UserWarning, match=r"'2': its forward was replaced"):
        model(X)
    model(X)  # warned of once
    sd.remove(model)
    handle = sd.apply(model, example=X)
    with handle.forced([False, False]):
        assert torch.equal(model(X), model[0](X))


def test_a_forward_method_replaced_on_the_class_after_sd_apply_is_warned_of():
    class Own(Left):
        def forward(self, x):
            return x + self.f(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), Own(), Own()).double()
    sd.apply(model, example=X)
    Own.forward = lambda self, x: x + 2 * self.f(x)  # as kernels that replace a library's own do
    with pytest.warns(UserWarning, match=r"Own\.forward was replaced after sd\.apply"):
        model(X)
    model(X)  # warned of once
    sd.remove(model)
    handle = sd.apply(model, example=X)
    with handle.forced([True, False]):
        h = model[0](X)
        torch.testing.assert_close(model(X), h + 2 * model[1].f(h))


def test_a_forward_method_that_is_wrapped_after_sd_apply_is_not_warned_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), Left(), Left(), Left()).double()
    handle = sd.apply(model, example=X)
    first, second, third = (model[n].forward for n in (1, 2, 3))
    model[1].forward = functools.wraps(first)(lambda *args: vars(model[1])["kept"](*args))
    model[1].kept = first
    model[2].forward = lambda x: 1 * second(x)
    model[3].forward = functools.partial(third)
    with handle.forced([False] * 3):
        assert torch.equal(model(X), model[0](X))


def test_a_class_has_one_registered_function():
    def another(block, gate, x):
        return skip_or_sum(block, gate, x)

    with pytest.raises(
        sd.errors.ApplyError, match=r"SaysHow.*skip_or_sum is registered already.*keep one of them"
    ):
        sd.register_unit(SaysHow)(another)


def test_a_cell_that_registers_a_function_can_be_run_again():
    def cell(factor):
        @sd.register_unit("notebook.Block")
        def forward(block, gate, x):
            return factor

        return forward

    cell(1)
    again = cell(2)
    notebook = type("Block", (Base,), {"__module__": "notebook", "__qualname__": "Block"})
    assert registered(notebook) is again


@pytest.mark.parametrize("given", ["Block", Base(), int, None])
def test_what_is_no_class_of_modules_is_not_registered(given):
    with pytest.raises(sd.errors.ApplyError, match="give a class of modules, or 'package"):
        sd.register_unit(given)


class SaysWrong(Base):
    """Is registered with functions that do something wrong with their gate closed."""

    def forward(self, x):
        return x + self.f(x)


def returns_another_value(block, gate, x):
    return x + gate.scale(block.f(gate.select(x))) if gate.open else 2 * x


def runs_its_branch(block, gate, x):
    branch = block.f(gate.select(x))
    return x + gate.scale(branch) if gate.open else x


def fails_when_closed(block, gate, x):
    return x + gate.scale(block.f(gate.select(x)) if gate.open else None)


@pytest.mark.parametrize("function", [returns_another_value, runs_its_branch, fails_when_closed])
@pytest.mark.parametrize("others", [[], [Left]], ids=["alone", "with others"])
def test_a_registered_function_that_is_wrong_is_named_with_what_it_has_to_do(
    function, others, monkeypatch
):
    monkeypatch.setitem(adapters._registered, f"{__name__}.SaysWrong", function)
    model = nn.Sequential(SaysWrong(), *(other() for other in others)).double()
    with pytest.raises(sd.errors.UnsupportedBlockError) as error:
        sd.apply(model, example=torch.randn(5, WIDTH, dtype=torch.float64))
    message = str(error.value)
    assert f"look at {__name__}.{function.__name__}, which sd.register_unit has for" in message
    assert "with its gate closed it must call no module of the branch, and return the" in message
    assert "tell sd.apply how to skip it" not in message
    assert ("exclude=['0'] leaves it unchanged; or look at" in message) == bool(others)


class Batchless(Base):
    """Samples mix in its branch, and are not its first dimension."""

    def forward(self, x):
        return (x.T + torch.tanh(self.two.weight[:, :1] @ x.T[:1])).T


def test_a_block_whose_samples_are_not_first_is_no_block_for_a_subset():
    assert len(sd.apply(network(Batchless), example=X).survival) == 3
    with pytest.raises(
        sd.errors.UnsupportedBlockError, match=r"first dimension is not the batch \(5\)"
    ):
        sd.apply(network(Batchless), example=X, gate="subset")


class SequenceFirst(nn.Module):
    """Its branch attends with the time steps first."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)

    def forward(self, x):
        h = self.norm(x).transpose(0, 1)
        h, _ = self.attention(h, h, h, need_weights=False)
        return x + h.transpose(0, 1)


@pytest.mark.parametrize(("batch", "steps"), [(6, 5), (16, 16), (2, 2)])
def test_a_branch_selects_samples_where_it_begins_not_wherever_a_length_fits(batch, steps):
    model = nn.Sequential(*(SequenceFirst() for _ in range(3))).double()
    original = copy.deepcopy(model)
    example = torch.randn(2, 5, 8, dtype=torch.float64)
    handle = sd.apply(model, sd.Uniform(0.5), example=example, gate="subset")
    for _ in range(8):
        x = torch.randn(batch, steps, 8, dtype=torch.float64)
        out, expected = model.train()(x), x
        for block, keep in zip(original, handle.gates, strict=True):
            expected = torch.where(keep[:, None, None], block(expected), expected)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


class HidesItsInput(Base):
    """What the branch runs on is not handed to it as a variable."""

    def forward(self, x):
        self.held = x
        return x + self.f(self.held)


def test_a_branch_whose_input_is_no_variable_of_its_method_runs_on_its_samples_only():
    model = network(HidesItsInput)
    handle = sd.apply(model, example=X, gate="subset")
    given = []
    model[1].two.register_forward_pre_hook(lambda module, args: given.append(len(args[0])))
    model.train()
    model(X)
    assert given == [handle.gates[0].sum().item()] * bool(handle.gates[0].any())


def test_a_checkpoint_of_the_original_fits_the_applied_model_and_the_reverse():
    original, model = network(Left), network(Left)
    trained = {name: value + 1 for name, value in original.state_dict().items()}
    sd.apply(model, sd.Uniform(1.0), example=X)
    model.load_state_dict(trained)
    original.load_state_dict(model.state_dict())
    assert torch.equal(original.eval()(X), model.eval()(X))


class SharedDropPath(Base):
    """As in Swin: one drop path for two units."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath(0.3)

    def forward(self, x):
        x = x + self.drop_path(self.one(x))
        return x + self.drop_path(self.two(x))


def test_a_drop_path_that_two_units_share_is_taken_over_once():
    model = network(SharedDropPath)
    sd.apply(model, sd.Uniform(0.5), example=X)
    assert {block.drop_path.drop_prob for block in list(model)[1:]} == {0.0}
    model.train()(X)
    sd.remove(model)
    assert {block.drop_path.drop_prob for block in list(model)[1:]} == {0.3}


def made_in_a_function():
    temperature, calls = 1.0, 0

    class InFunction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x, g=1.0):
            nonlocal calls
            calls += 1
            h = torch.tanh(self.f(x))
            return x + g * temperature * h

    def anneal(value):
        nonlocal temperature
        temperature = value

    return nn.Sequential(*(InFunction() for _ in range(3))).double(), anneal, lambda: calls


@pytest.mark.parametrize("pattern", list(itertools.product((False, True), repeat=3)))
def test_a_method_and_its_original_share_the_variables_of_the_function_around_them(pattern):
    model, anneal, calls = made_in_a_function()
    original = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    anneal(0.25)
    before = calls()
    with handle.forced(list(pattern)):
        out = model(X)
    assert calls() == before + 3
    expected = X
    for block, is_open in zip(original, pattern, strict=True):
        expected = block(expected, float(is_open))
    torch.testing.assert_close(out, expected)


def test_a_variable_may_get_its_first_value_after_sd_apply_was_called():
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.late = nn.Linear(4, 4), False

        def forward(self, x):
            h = torch.tanh(self.f(x))
            if self.late:
                return x + h * factor
            return x + h

    model = nn.Sequential(Late()).double()
    handle = sd.apply(model, sd.Uniform(0.5), example=X)
    factor = 3.0
    assert factor
    model[0].late = True
    with handle.forced([True]):
        torch.testing.assert_close(model(X), X + 3.0 * torch.tanh(model[0].f(X)))
