"""Gates belong to their forward pass: around it, in its backward pass, and on other ways in."""

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.torch_private import call_of

BLOCKS = 5
HALF = sd.Uniform(0.5)
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),  # in evaluation
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # the compiler, looking at a tensor
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.double()

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x))


def batch(step: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, dtype=torch.float64, generator=rng)


def by_hand(model: Net, x: Tensor, gates: Tensor) -> Tensor:
    """What the net gives under `gates`, bool [L] or [L, batch], written out."""
    h = nn.functional.linear(x, model.stem.weight, model.stem.bias)
    for block, gate in zip(model.blocks, gates, strict=True):
        f = torch.tanh(nn.functional.linear(h, block.f.weight, block.f.bias))
        h = h + gate.to(h).reshape(-1, 1) * f
    return nn.functional.linear(h, model.head.weight, model.head.bias)


def applied(model: nn.Module | None = None, **options: Any) -> tuple[Any, sd.Handle]:
    model = Net() if model is None else model
    options = {"survival": HALF, **options}
    return model, sd.apply(model, example=batch(), **options)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def expected_gradients(model: Net, x: Tensor, gates: Tensor) -> list[Tensor]:
    """By the formula, with the parameters of closed blocks in the graph times 0."""
    parameters = list(model.parameters())
    return list(torch.autograd.grad(by_hand(model, x, gates).square().sum(), parameters))


# Other ways in.

WAYS_IN = {
    "a method": lambda model, x: model.features(x),
    "forward": lambda model, x: model.forward(x),
    "a part": lambda model, x: model.blocks[2](model.stem(x)),
}


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
@pytest.mark.parametrize("called", [0, 1, 3])
def test_another_way_in_is_the_same_error_before_and_after_the_model_was_called(way, called):
    model, handle = applied()
    model.train()
    for step in range(called):
        model(batch(step)).sum().backward()
    with pytest.raises(sd.errors.GateError, match=r"with handle\.draw\(\):"):
        way(model, batch())
    assert handle.step == called


@pytest.mark.parametrize("way", WAYS_IN.values(), ids=WAYS_IN)
def test_the_remedy_of_that_error_works(way):
    model, handle = applied()
    seen = set()
    for step in range(8):
        with handle.draw():
            out = way(model, batch())
        assert handle.step == step + 1
        assert torch.equal(handle.gates, handle.gates_at(step))
        seen.add(round(out.sum().item(), 9))
        with pytest.raises(sd.errors.GateError, match="outside of a forward pass of the model"):
            way(model, batch())
    assert len(seen) > 1


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_the_remedy_takes_the_number_of_samples(gate):
    model, handle = applied(gate=gate)
    with handle.draw(6):
        features = model.features(batch())
    torch.testing.assert_close(model.head(features), by_hand(model, batch(), handle.gates))


def test_a_failed_forward_pass_leaves_no_gates():
    model, handle = applied()
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 7, dtype=torch.float64))
    assert [block.gates[0].training for block in handle.blocks] == [None] * BLOCKS
    with pytest.raises(sd.errors.GateError, match="outside of a forward pass of the model"):
        model.features(batch())


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("inside", ["a pass", "draw"])
def test_after_an_interrupted_pass_all_is_as_before(inside):
    model, handle = applied()
    around = handle.draw() if inside == "draw" else nullcontext()
    hook = model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), around:
        model.train()(batch())
    hook.remove()
    for step in range(5):
        torch.testing.assert_close(model(batch(step)), by_hand(model, batch(step), handle.gates))
        with pytest.raises(sd.errors.GateError, match="outside of a forward pass of the model"):
            model.features(batch())
    with ThreadPoolExecutor(1) as thread:
        out = thread.submit(model, batch()).result()
    torch.testing.assert_close(out, by_hand(model, batch(), handle.gates))
    assert not any(map(call_of, model.modules()))  # nothing of the interrupted pass is left


class Twice(Net):
    """Calls itself in its own forward pass, after `interrupted` passes that it has given up."""

    depth, interrupted = 0, 0

    def forward(self, x: Tensor) -> Any:
        h = self.blocks[:3](self.stem(x))
        inner = torch.zeros(6, 2, dtype=x.dtype)
        if self.depth == 0:
            self.depth = 1
            for _ in range(self.interrupted):
                hook = self.blocks[1].register_forward_pre_hook(interrupt)
                with suppress(KeyboardInterrupt):
                    self(x)
                hook.remove()
            inner, self.depth = self(x), 0
        return inner + self.head(self.blocks[3:](h))


@pytest.mark.parametrize("interrupted", [0, 2])
def test_a_pass_within_a_pass_has_gates_of_its_own_and_the_outer_one_goes_on(interrupted):
    model, handle = applied(Twice())
    model.train().interrupted = interrupted
    each = interrupted + 2
    for step in range(4):
        outer, inner = handle.gates_at(each * step), handle.gates_at(each * step + each - 1)
        expected = by_hand(model, batch(), outer) + by_hand(model, batch(), inner)
        torch.testing.assert_close(model(batch()), expected)


@pytest.mark.parametrize("module", [0, 3, -1])
def test_a_stage_in_training_mode_in_an_evaluating_model_is_drawn_for(module):
    model, handle = applied()
    model.eval().blocks[module].train()
    for step in range(6):
        out = model(batch())
        assert handle.step == step + 1
        share = torch.full((BLOCKS,), 0.5, dtype=torch.float64)
        share[module] = handle.gates[module].double()
        torch.testing.assert_close(out, by_hand(model, batch(), share))


# Forced gates.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("way", ["model", *WAYS_IN])
def test_forced_gates_hold_in_training_and_evaluation_for_every_way_in(training, third, way):
    model, handle = applied()
    model.train(training)
    pattern = torch.tensor([True, False, third, False, False])
    with handle.forced(pattern):
        out, again = (WAYS_IN.get(way, Net.__call__)(model, batch()) for _ in range(2))
    assert torch.equal(out, again)
    if way == "a part":
        h = model.stem(batch())
        torch.testing.assert_close(out, h + pattern[2] * torch.tanh(model.blocks[2].f(h)))
    else:
        out = model.head(out) if way == "a method" else out
        torch.testing.assert_close(out, by_hand(model, batch(), pattern))
    assert handle.step == 0
    if training:
        model(batch())
        assert torch.equal(handle.gates, handle.gates_at(0))


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("training", [True, False])
def test_gates_of_single_samples_can_be_forced(gate, training):
    model, handle = applied(gate=gate)
    pattern = torch.rand(BLOCKS, 6, generator=torch.Generator().manual_seed(1)) < 0.5
    with handle.forced(pattern):
        out = model.train(training)(batch())
    torch.testing.assert_close(out, by_hand(model, batch(), pattern))


def test_forced_gates_are_those_of_the_backward_pass_and_end():
    model, handle = applied()
    pattern = torch.tensor([False, True, False, True, True])
    with handle.forced([True] * BLOCKS), handle.forced(pattern):
        loss = model(batch()).square().sum()
    loss.backward()
    for mine, right in zip(
        gradients(model), expected_gradients(model, batch(), pattern), strict=True
    ):
        torch.testing.assert_close(mine, right)
    with pytest.raises(sd.errors.GateError, match="outside of a forward pass of the model"):
        model.features(batch())


def shares(model: Net, x: Tensor, factors: Tensor) -> list[Tensor | None]:
    """The gradients of the net in which the branches are multiplied by `factors`."""
    plain = copy.deepcopy(model)
    plain.zero_grad()
    by_hand(plain, x, factors).square().sum().backward()
    return gradients(plain)


def assert_summed(model: Net, parts: list[list[Tensor | None]]) -> None:
    """The gradients of `model` are the sum of `parts`, in which None is zero."""
    for mine, *right in zip(gradients(model), *parts, strict=True):
        expected = sum(part for part in right if part is not None)
        torch.testing.assert_close(torch.zeros_like(expected) if mine is None else mine, expected)


SUBNETWORKS = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_in_evaluation_each_pass_is_recomputed_as_the_subnetwork_that_it_was(
    recompute, scaled, compiled
):
    model, handle = applied(Wrapped(lambda y: y, recompute))
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    model.eval()
    losses, parts = [], []
    for step, gates in enumerate(SUBNETWORKS):
        with (handle.forced if step else handle.subnetwork)(gates, scaled=scaled):
            losses.append(model(batch(step)).square().sum())
        parts.append(shares(model, batch(step), gates * (0.5 if scaled else 1.0)))
    losses.append(model(batch(9)).square().sum())
    parts.append(shares(model, batch(9), torch.full((BLOCKS,), 0.5)))
    sum(losses).backward()
    assert_summed(model, parts)
    with torch.no_grad():  # the usual gates are in force again
        usual = by_hand(model, batch(), torch.full((BLOCKS,), 0.5, dtype=torch.float64))
        torch.testing.assert_close(model(batch()), usual)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [None, True, False])
def test_frozen_blocks_are_recomputed_under_the_probabilities_of_their_pass(recompute, compiled):
    model, handle = applied(Wrapped(lambda y: y, recompute), schedule=sd.Warmup(4))
    if compiled:
        for block in model.blocks:
            block.compile(backend="eager")
    model.train().blocks[:3].eval()
    losses, parts, seen = [], [], set()
    for step in range(3):
        losses.append(model(batch(step)).square().sum())
        factors = [*handle.survival[:3], *handle.gates[3:].double().tolist()]
        parts.append(shares(model, batch(step), torch.tensor(factors, dtype=torch.float64)))
        seen.add(handle.survival)
    assert len(seen) == 3
    sum(losses).backward()
    assert_summed(model, parts)


@pytest.mark.parametrize("way", ["a method", "the whole model"])
def test_a_recomputation_in_evaluation_of_an_unknown_pass_is_refused_if_its_gates_changed(way):
    model, handle = applied(Wrapped(lambda y: y, recompute=True))
    model.eval()

    def loss() -> Tensor:
        x = batch().requires_grad_()
        if way == "the whole model":
            return checkpoint(model, x, use_reentrant=True).square().sum()
        h = model.stem(x)
        for block in model.blocks:
            h = checkpoint(block, h, use_reentrant=True)
        return model.head(h).square().sum()

    with handle.subnetwork(SUBNETWORKS[0]):
        late = loss()
    with pytest.raises(sd.errors.GateError, match=r"block 'blocks\.\d'.*within the context; or"):
        late.backward()
    for gates in SUBNETWORKS[:2]:  # the remedy
        model.zero_grad()
        with handle.subnetwork(gates):
            loss().backward()
        assert_summed(model, [shares(model, batch(), gates.double())])
    model.zero_grad()
    loss().backward()
    assert_summed(model, [shares(model, batch(), torch.full((BLOCKS,), 0.5))])


def test_in_evaluation_nothing_of_a_pass_is_kept_but_its_gates():
    model, handle = applied()
    model.eval()
    for around in (torch.no_grad, torch.inference_mode):
        with around():
            model(batch())
    assert not handle.passes._recent
    out = model(batch())
    kept, passes = weakref.ref(out), handle.passes
    assert len(passes._recent) == 1
    del out
    assert kept() is None
    for step in range(200):
        model(batch(step))
    assert len(passes._passes) == len(passes._recent) < 100


WRONG_GATES = [True], [[[True] * 2] * BLOCKS], torch.ones(BLOCKS), "abc", None


@pytest.mark.parametrize("wrong", WRONG_GATES)
def test_forced_gates_that_do_not_fit_are_an_error_that_says_what_fits(wrong):
    _, handle = applied()
    with pytest.raises(
        sd.errors.GateError, match=r"bool \[5\], one gate for each block, or bool \[5, b"
    ):
        handle.forced(wrong).__enter__()


# The beginning of the backward pass.


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    note: str = ""


class Slotted:
    __slots__ = ("inside",)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


class Named(NamedTuple):
    logits: Tensor


CONTAINERS = {
    "a tensor": (lambda y: y, lambda out: out),
    "a dataclass": (Answer, lambda out: out.logits),
    "slots": (Slotted, lambda out: out.inside),
    "an object in a list": (
        lambda y: [Slotted({"a": Answer(y)})],
        lambda out: out[0].inside["a"].logits,
    ),
    "a named tuple": (Named, lambda out: out.logits),
}


class Wrapped(Net):
    """Gives its result in a container, and recomputes its blocks if asked to."""

    def __init__(self, wrap: Any, recompute: bool | None = None) -> None:
        super().__init__()
        self.wrap, self.recompute = wrap, recompute

    def forward(self, x: Tensor) -> Any:
        h = self.stem(x)
        for block in self.blocks:
            if self.recompute is None:
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.recompute)
        return self.wrap(self.head(h))


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("recompute", [None, True, False])
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_wherever_outputs_are_each_backward_pass_has_its_gates(name, recompute, skipped):
    wrap, unwrap = CONTAINERS[name]
    model, handle = applied(Wrapped(wrap, recompute), skipped=skipped)
    losses, right = [], None
    for step in range(3):
        losses.append(unwrap(model(batch(step))).square().sum())
        one = expected_gradients(model, batch(step), handle.gates)
        right = one if right is None else [a + b for a, b in zip(right, one, strict=True)]
    never_open = ~torch.stack([handle.gates_at(step) for step in range(3)]).any(0)
    sum(losses).backward()
    for (parameter, mine), true in zip(model.named_parameters(), right, strict=True):
        block = int(parameter.split(".")[1]) if parameter.startswith("blocks") else None
        if skipped == "freeze" and block is not None and never_open[block]:
            assert mine.grad is None
        else:
            torch.testing.assert_close(mine.grad, true)


@pytest.mark.parametrize("recompute", [None, True, False])
def test_a_loss_of_a_hooked_feature_gives_what_multiplying_by_zero_gives(recompute):
    model, handle = applied(Wrapped(lambda y: y, recompute))
    kept: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    for step in range(6):
        model.zero_grad()
        model(batch(step))
        kept.pop().square().sum().backward()
        trained = [*model.stem.parameters(), *model.blocks.parameters()]
        h = model.stem(batch(step))
        for block, gate in zip(model.blocks, handle.gates, strict=True):
            h = h + gate * torch.tanh(block.f(h))
        right = torch.autograd.grad(h.square().sum(), trained)
        for parameter, true in zip(trained, right, strict=True):
            torch.testing.assert_close(parameter.grad, true)


def test_gradients_that_are_asked_for_are_given_and_written_nowhere():
    model, handle = applied()
    gates = torch.arange(BLOCKS) % 2 == 1
    with handle.forced(gates):
        loss = model(batch()).square().sum()
    right = expected_gradients(model, batch(), gates)
    parameters = list(model.parameters())
    for wanted in (parameters, [model.stem.weight]):
        given = torch.autograd.grad(
            loss, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for one, parameter in zip(given, wanted, strict=True):
            true = next(t for p, t in zip(parameters, right, strict=True) if p is parameter)
            torch.testing.assert_close(one, true)
        assert all(parameter.grad is None for parameter in parameters)
    loss.backward(inputs=[model.stem.weight], retain_graph=True)
    written = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert written == ["stem.weight"]
    model.zero_grad()
    loss.backward()
    for parameter, true in zip(parameters, right, strict=True):
        torch.testing.assert_close(parameter.grad, true)


def test_gates_are_not_in_force_after_the_backward_pass_either():
    model, handle = applied(Wrapped(lambda y: y, recompute=True))
    model(batch()).sum().backward()
    assert [block.gates[0].training for block in handle.blocks] == [None] * BLOCKS


def test_a_parameter_that_the_model_returns_gets_no_hooks():
    class Two(Net):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.head.bias

    model, _ = applied(Two())
    for step in range(5):
        y, bias = model(batch(step))
        assert bias is model.head.bias
        (y * bias).sum().backward()
        assert not bias._backward_hooks
    assert all(not block._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_where_all_that_is_trained_is_closed_a_step_has_a_graph(skipped, name):
    wrap, unwrap = CONTAINERS[name]
    model, handle = applied(Wrapped(wrap), skipped=skipped)
    model.requires_grad_(False)
    model.blocks[2].requires_grad_(True)
    closed = 0
    for step in range(8):
        model.zero_grad()
        out = unwrap(model(batch(step)))
        torch.testing.assert_close(out, by_hand(model, batch(step), handle.gates))
        out.square().sum().backward()
        is_open, weight = bool(handle.gates[2]), model.blocks[2].f.weight
        closed += not is_open
        if is_open:
            assert weight.grad.abs().sum() > 0
        elif skipped == "paper":
            assert torch.equal(weight.grad, torch.zeros_like(weight))
        else:
            assert weight.grad is None
    assert closed > 1


def test_a_model_that_gives_its_input_back_leaves_no_hook_on_it():
    model = nn.Sequential(Block(), Block()).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    handle = sd.apply(model, HALF, example=x.detach())
    with handle.forced([False, False]):
        model(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert not x._backward_hooks
    assert torch.equal(model[0].f.weight.grad, torch.zeros(4, 4, dtype=torch.float64))


# Function transforms.


def of_trunk() -> nn.Module:
    """Blocks that are deferred."""

    class Trunk(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.blocks:
                h = h + torch.tanh(block.f(h))
            return self.head(h)

    return Trunk()


PATTERNS = [[True] * BLOCKS, [False] * BLOCKS, [True, False, False, True, False]]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, for jvp
@pytest.mark.parametrize("gates", PATTERNS, ids=str)
@pytest.mark.parametrize("make", [Net, of_trunk])
@pytest.mark.parametrize("training", [True, False])
def test_function_transforms_give_what_the_net_written_out_gives(training, make, gates):
    model, handle = applied(make())
    model.train(training)
    x, open_ones = batch(), torch.tensor(gates)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, values, (sample,)).square().sum()

    with handle.forced(gates):
        torch.testing.assert_close(vmap(model)(x), by_hand(model, x, open_ones))
        by_sample = vmap(grad(loss), (None, 0))(values, x)
        _, tangents = jvp(model, (x,), (x,))
        jacobian = jacrev(model)(x)
    assert all(parameter.grad is None for parameter in model.parameters())
    _, true = jvp(lambda x: by_hand(model, x, open_ones), (x,), (x,))
    torch.testing.assert_close(tangents, true)
    true = jacrev(lambda x: by_hand(model, x, open_ones))(x)
    torch.testing.assert_close(jacobian, true)
    for number, sample in enumerate(x):
        expected = expected_gradients(model, sample, open_ones)
        for found, true in zip(by_sample.values(), expected, strict=True):
            torch.testing.assert_close(found[number], true)


@pytest.mark.parametrize("schedule", [None, sd.Warmup(10)])
@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
def test_gates_that_are_drawn_within_a_function_transform_are_kept(gate, schedule):
    model, handle = applied(gate=gate, schedule=schedule)
    for step in range(3):
        grad(lambda x: model(x).sum())(batch())
        assert torch.equal(handle.gates, handle.gates_at(step, 6))
    copy.deepcopy(model)
    model.eval()(batch())


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_gates_of_samples_that_vmap_hides_are_refused_with_the_remedy(gate):
    model, handle = applied(gate=gate)
    for transformed in (vmap(model), vmap(grad(lambda x: model(x).sum()))):
        with pytest.raises(sd.errors.GateError, match=r'torch\.vmap.*use gate="batch"'):
            transformed(batch())
    assert handle.step == 0
    model, handle = applied()
    vmap(model)(batch())
    assert handle.step == 1


# Traces of torch.fx.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["model", "draw", "inside", "forced"])
@pytest.mark.parametrize("make", [Net, of_trunk])
def test_a_trace_that_would_keep_the_gates_of_one_pass_is_refused(make, way, training):
    model, handle = applied(make())
    model.train(training)
    around = {"draw": handle.draw, "forced": lambda: handle.forced(PATTERNS[2])}.get(way)
    traced = nn.Sequential(model) if way == "inside" else model
    with (
        around() if around else nullcontext(),
        pytest.raises(sd.errors.GateError, match=r"sd\.fold\(model, example\).*forward_hook"),
    ):
        torch.fx.symbolic_trace(traced)
    out = model.eval()(batch())  # and nothing of the trace is left
    torch.testing.assert_close(out, by_hand(model, batch(), torch.full((BLOCKS,), 0.5)))


@pytest.mark.parametrize("remedy", ["fold", "remove", "hook"])
def test_the_remedies_of_that_error_work(remedy):
    model, handle = applied(scale="inference" if remedy == "hook" else "training")
    if remedy == "hook":
        features = []
        model.blocks[2].register_forward_hook(lambda *args: features.append(args[-1]))
        for step in range(6):
            model(batch(step))
            h = model.stem(batch(step))
            for block, gate in zip(model.blocks[:3], handle.gates, strict=False):
                h = h + gate * torch.tanh(block.f(h))
            torch.testing.assert_close(features[-1], h)
        return
    right = by_hand(model, batch(), torch.ones(BLOCKS))
    model.eval()
    sd.fold(model, batch()) if remedy == "fold" else sd.remove(model)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(batch()), right)


TRACES = {
    "torch.jit.trace": lambda model: torch.jit.trace(model, batch()),
    "torch.export": lambda model: torch.export.export(model, (batch(),), strict=False).module(),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("make", [Net, of_trunk])
def test_a_graph_of_training_mode_that_would_keep_its_gates_is_refused(make, trace):
    model, handle = applied(make())
    with pytest.raises(sd.errors.GateError, match=rf"{trace} traces .* call model\.eval"):
        TRACES[trace](model.train())
    with pytest.raises(sd.errors.GateError, match=trace), handle.draw():
        TRACES[trace](model)
    assert handle.step == 1  # of the context
    whole = TRACES[trace](model.eval())
    torch.testing.assert_close(whole(batch()), model(batch()))


def test_torch_export_traces_the_network_of_evaluation():
    model, _ = applied()
    exported = torch.export.export(model.eval(), (batch(),), strict=False).module()
    torch.testing.assert_close(exported(batch()), model(batch()))


# Models that are changed after sd.apply.


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(4, 2).double(), nn.Linear(2, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def change_blocks(change: Any) -> Any:
    def change_all(model: Net) -> None:
        for number, block in enumerate(model.blocks):
            changed = change(block)
            model.blocks[number] = block if changed is None else changed

    return change_all


CHANGES = {
    "checkpoint wrappers": change_blocks(checkpoint_wrapper),
    "compiled": change_blocks(lambda block: torch.compile(block, backend="eager")),
    "adapters": change_blocks(lambda block: setattr(block, "f", LowRank(block.f))),
    "weight norm": change_blocks(lambda b: parametrizations.weight_norm(b.f) and None),
    "spectral norm": change_blocks(lambda b: parametrizations.spectral_norm(b.f) and None),
    "pruned": change_blocks(lambda b: prune.random_unstructured(b.f, "weight", 0.5) and None),
    "frozen": lambda model: model.blocks[1].f.weight.requires_grad_(False),
    "replaced": lambda model: setattr(model.blocks[0], "f", nn.Linear(4, 4).double()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_branch_has_now_gets_the_gradients(change):
    model, _ = applied()
    model(batch()).sum().backward()
    change(model)
    for step in range(4):
        model.zero_grad()
        model(batch(step)).sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert [name for name, gradient in trained.items() if gradient is None] == []
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


class Quantised(nn.Module):
    """Holds nothing of the layer that it replaces."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", of.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def of_residual_units() -> nn.Module:
    units = (sd.Residual(nn.Linear(4, 4)) for _ in range(BLOCKS))
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(*units)).double()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "new"),
    [(Net, Block), (of_residual_units, lambda: sd.Residual(nn.Linear(4, 4)))],
)
def test_a_block_that_is_replaced_after_sd_apply_is_warned_of_with_the_remedy(make, new, training):
    model, handle = applied(make())
    blocks = model.blocks if make is Net else model[1]
    model.train(training)(batch())
    blocks[2], blocks[4] = new().double(), new().double()
    with pytest.warns(UserWarning, match=r"2' was replaced after sd\.apply, by a \w+; .*1 more"):
        model(batch())
    model(batch())  # warned of once
    sd.remove(model)
    handle = sd.apply(model, HALF, example=batch())
    with handle.forced([False] * BLOCKS):
        h = (model.stem if make is Net else model[0])(batch())
        assert torch.equal(model(batch()), model.head(h) if make is Net else h)


def moved(model: Net) -> None:
    model.blocks = nn.Sequential(*model.blocks[1:], nn.Identity())


def lists(model: Net) -> None:
    model.blocks = nn.Sequential(nn.Sequential(*model.blocks[:2]), *model.blocks[2:])


LEGITIMATE = {
    **CHANGES,
    "quantised": change_blocks(lambda block: setattr(block, "f", Quantised(block.f))),
    "taken off": lambda model: model.blocks.__delitem__(slice(2, None)),
    "moved": moved,
    "in other lists": lists,
}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("change", LEGITIMATE.values(), ids=LEGITIMATE)
def test_other_changes_of_a_model_are_not_warned_of(change, early):
    model, _ = applied()
    if not early:
        model(batch())
    change(model)
    for training in (True, False):
        model.train(training)(batch())


def test_a_block_that_is_replaced_in_a_copy_is_warned_of_there_alone():
    model, _ = applied()
    other = copy.deepcopy(model)
    other(batch())
    other.blocks[0] = Block().double()
    model(batch())
    with pytest.warns(UserWarning, match=r"'blocks\.0' was replaced after sd\.apply"):
        other(batch())


def test_skipped_embeddings_with_sparse_gradients_get_empty_sparse_ones():
    class Looked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.f = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)

        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            return x + self.f(self.table(words) + x)

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(4, 4)
            self.blocks = nn.ModuleList(Looked() for _ in range(3))

        def forward(self, x: Tensor, words: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, words)
            return x

    model, example = Words(), (torch.randn(2, 4), torch.tensor([1, 8]))
    handle = sd.apply(model, HALF, example=example)
    optimizer = torch.optim.SparseAdam([block.table.weight for block in model.blocks])
    with handle.forced([True, False, False]):
        for _ in range(2):
            optimizer.zero_grad()
            model(*example).sum().backward()
            optimizer.step()
    sizes = [block.table.weight.grad.coalesce().indices().numel() for block in model.blocks]
    assert sizes == [2, 0, 0]


def test_replicas_in_threads_are_refused_and_processes_named():
    model, _ = applied()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(sd.errors.GateError, match="DistributedDataParallel"):
        replica(batch())
    with pytest.raises(sd.errors.ApplyError, match="DistributedDataParallel"):
        sd.apply(nn.DataParallel(Net()), HALF, example=batch())


def in_a_thread(work):
    """What `work` returns or raises in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_what_another_thread_calls_is_not_taken_for_the_pass_under_way():
    model, handle = applied()
    other = 2 * torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def call_the_next(*_):
        in_a_thread(lambda: model.blocks[1](other))

    model.blocks[0].register_forward_hook(call_the_next)
    with handle.forced([True, False, True, True, True]):
        model(batch()).square().sum().backward()
    closed = model.blocks[1].f
    assert torch.equal(closed.weight.grad, torch.zeros_like(closed.weight))
    assert torch.equal(closed.bias.grad, torch.zeros_like(closed.bias))


def test_a_second_thread_in_training_mode_is_refused_and_the_first_goes_on():
    model, handle = applied()
    refused = []

    def call_again(*_):
        if not refused:
            refused.append(None)
            with pytest.raises(sd.errors.GateError, match=r"copy\.deepcopy") as caught:
                in_a_thread(lambda: model(batch(1)))
            refused[0] = caught

    model.blocks[0].register_forward_hook(call_again)
    output = model(batch())
    assert refused
    assert handle.step == 1
    expected = by_hand(model, batch(), handle.gates)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_passes_of_two_threads_are_each_recomputed_under_their_own_gates(order):
    model, handle = applied(Wrapped(lambda y: y, recompute=False))
    gates = [torch.tensor([1, 0, 1, 0, 1]).bool(), torch.tensor([0, 1, 0, 1, 0]).bool()]
    losses = []
    for step in range(2):
        with handle.forced(gates[step]):
            losses.append(in_a_thread(lambda step=step: model(batch(step)).square().sum()))
    for step in order:
        model.zero_grad()
        losses[step].backward()
        expected = expected_gradients(model, batch(step), gates[step])
        for mine, true in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(mine, true)


def test_a_copy_has_its_own_passes():
    model, _ = applied(Wrapped(lambda y: y, recompute=True))
    loss = model(batch()).square().sum()
    other = copy.deepcopy(model)
    other(batch(1)).square().sum().backward()
    loss.backward()
    twin, _ = applied(Wrapped(lambda y: y))
    twin(batch()).square().sum().backward()
    for mine, true in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(mine, true)
    twin.zero_grad()
    twin(batch(1)).square().sum().backward()
    for mine, true in zip(gradients(other), gradients(twin), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.parametrize("training", [True, False])
def test_a_change_of_mode_before_the_backward_pass_changes_no_gates(training) -> None:
    model = nn.Sequential(*(sd.Residual(nn.Linear(3, 3)) for _ in range(6))).double()
    handle = sd.apply(model, sd.Uniform(0.5), scale="training")
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = model

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return x

    sd.remove(model)
    whole = Checkpointed().train(training)
    handle = sd.apply(whole, sd.Uniform(0.5), scale="training")
    loss = whole(x).sum()
    whole.train(not training)
    loss.backward()
    found, x.grad = x.grad, None
    whole.train(training)
    expected = whole.blocks
    gates = handle.gates_at(0).tolist() if training else [True] * 6
    y = x
    for block, is_open in zip(expected, gates, strict=True):
        y = y + (block.branch(y) * (2 if training else 1) if is_open else 0)
    y.sum().backward()
    torch.testing.assert_close(found, x.grad)
