"""torch.compile on the blocks of a model: at most two graphs each, whatever the gates."""

import copy
import functools
import itertools
import shutil
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from torch._guards import CompileContext
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet
from stochastic_depth.surgery import install
from stochastic_depth.surgery.applied import applied_to

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
PATTERNS = 300
EQUAL, DIFFERENT = [4] * 12, list(range(3, 15))
"""Widths of blocks. The compiler keeps 8 graphs of a code object: five different blocks' are 10."""


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Inherited(Block):
    def forward(self, x):
        return super().forward(x)


class Called(Block):
    def forward(self, x):
        return self.run(x)

    def run(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Checkpointing(nn.Module):
    """Wraps `forward` of each class derived from it, as transformers does."""

    checkpointing = False

    def __init_subclass__(cls):
        forward = cls.forward

        @functools.wraps(forward)
        def wrapped(self, x):
            if self.checkpointing and type(self).forward is wrapped:
                return checkpoint(functools.partial(forward, self), x, use_reentrant=False)
            return forward(self, x)

        cls.forward = wrapped


class Wrapped(Checkpointing):
    def __init__(self, width):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


def unit(width):
    return sd.Residual(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()))


def stack(block, widths):
    """Blocks of the given widths, what goes from one to the next padded or cut."""
    parts = [block(widths[0])]
    for before, width in itertools.pairwise(widths):
        if before != width:
            parts.append(nn.ConstantPad1d((0, width - before), 0.0))
        parts.append(block(width))
    return nn.Sequential(*parts)


def inputs(widths):
    """They need gradients, as what a stem makes does: with and without are two graphs."""
    return torch.randn(2, widths[0], requires_grad=True)


@dataclass(eq=False)
class Graphs:
    """A backend that compiles nothing, and what it was asked for."""

    of: Counter[int | None] = field(default_factory=Counter)
    """Number of graphs of each code object."""
    last: int = -1
    """The training step of the last one."""
    symbolic: int = 0
    """How many were for changing sizes."""
    handle: sd.Handle | None = None

    def __call__(self, graph, inputs):
        compiling = CompileContext.current_compile_id()
        assert compiling is not None
        assert self.handle is not None
        self.of[compiling.frame_id] += 1
        self.last = self.handle.step
        self.symbolic += any(isinstance(given, torch.SymInt) for given in inputs)
        return graph.forward

    def count(self):
        return self.of.total()


@pytest.fixture(autouse=True)
def strict():
    """The compiler forgets other tests, and fails where it would go on without compiling."""
    torch._dynamo.reset()
    config = torch._dynamo.config
    newer = hasattr(config, "fail_on_recompile_limit_hit")  # torch 2.6 has it by another name
    name = "fail_on_recompile_limit_hit" if newer else "fail_on_cache_limit_hit"
    with config.patch(**{name: True}):
        yield
    torch._dynamo.reset()


def compiled(model, example=None, backend=None, **options):
    """`model` with stochastic depth, each block compiled; the graphs, the handle."""
    graphs = Graphs()
    handle = graphs.handle = sd.apply(
        model, options.pop("survival", sd.Uniform(0.5)), example=example, **options
    )
    assert sd.compile_blocks(model, backend=backend or graphs) is model
    return graphs, handle


def train(model, handle, x, steps):
    """Training steps; the number of those after which each block was open and closed."""
    seen = torch.zeros(2, len(handle.blocks), dtype=torch.bool)
    settled = steps
    for step in range(steps):
        out = model(x)
        getattr(out, "logits", out).sum().backward()
        seen |= torch.stack([handle.gates, ~handle.gates])
        if seen.all() and settled == steps:
            settled = step + 1
    assert settled < steps, "too few steps to see every gate open and closed"
    return settled


@pytest.mark.parametrize("block", [Block, Inherited, Called, Wrapped, unit])
def test_each_block_has_two_graphs_and_none_later(block):
    model, x = stack(block, DIFFERENT), inputs(DIFFERENT)
    graphs, handle = compiled(model, None if block is unit else x)
    settled = train(model, handle, x, PATTERNS)
    assert set(graphs.of.values()) == {2}
    assert graphs.count() == 2 * len(DIFFERENT)
    assert graphs.last <= settled


@pytest.mark.parametrize("block", [Block, unit])
def test_equal_blocks_share_their_graphs(block):
    model, x = stack(block, EQUAL), inputs(EQUAL)
    graphs, handle = compiled(model, None if block is unit else x)
    train(model, handle, x, 40)
    assert graphs.count() == 2


def test_different_blocks_are_not_taken_for_one_of_changing_size():
    model, x = stack(Block, DIFFERENT), inputs(DIFFERENT)
    graphs, handle = compiled(model, x)
    train(model, handle, x, 40)
    assert graphs.symbolic == 0


@pytest.mark.parametrize("gate", ["batch", "sample"])
def test_probabilities_that_change_every_step_are_not_compiled_in(gate):
    model, x = stack(Block, EQUAL), inputs(EQUAL)
    rates = {"survival": sd.LinearDecay(0.5), "schedule": sd.Warmup(100)}
    graphs, handle = compiled(model, x, **rates, scale="training", gate=gate)
    for _ in range(PATTERNS):
        model(x).sum().backward()
    assert handle.survival[-1] == 0.5
    assert graphs.count() == {"batch": 2, "sample": 1}[gate]


def test_evaluation_has_one_graph_more_for_all_probabilities():
    model, x = stack(Block, EQUAL), inputs(EQUAL)
    graphs, handle = compiled(model, x, survival=sd.LinearDecay(0.5))
    train(model, handle, x, 60)
    model.eval()
    model(x)
    assert graphs.count() == 3


def test_several_additions_have_two_graphs_for_each():
    class Two(Block):
        def forward(self, x):
            x = x + self.linear(x)
            return x + torch.tanh(self.linear(self.norm(x)))

    model, x = stack(Two, [3, 4, 5]), inputs([3])
    graphs, handle = compiled(model, x, granularity="unit")
    train(model, handle, x, 60)
    assert len(handle.blocks) == 6
    assert graphs.count() == 12


def test_a_class_that_wraps_forward_in_its_children_still_knows_the_outermost():
    model, x = stack(Wrapped, EQUAL), inputs(EQUAL)
    handle = sd.apply(model, sd.Uniform(1.0), example=x)
    calls = []
    for block in handle.blocks:
        module = model.get_submodule(block.name)
        module.checkpointing = True
        module.norm.register_forward_pre_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    assert len(calls) == 2 * len(EQUAL)


def test_removed_blocks_have_their_own_code_again():
    model = stack(unit, EQUAL)
    sd.apply(model)
    assert type(model[0]) is not sd.Residual
    sd.remove(model)
    assert type(model[0]) is sd.Residual
    assert install.GATES not in vars(model[0])


def published(name):
    if name.startswith("cifar-resnet"):
        return CifarResNet(int(name.removeprefix("cifar-resnet"))), torch.randn(2, 3, 8, 8)
    if name == "resnet18":
        models = pytest.importorskip("torchvision.models", reason="needs torchvision")
        return models.resnet18(num_classes=10), torch.randn(2, 3, 32, 32)
    if name == "vit":
        timm = pytest.importorskip("timm", reason="needs timm")
        small = {"img_size": 32, "embed_dim": 24}
        return timm.create_model("vit_tiny_patch16_224", **small), torch.randn(2, 3, 32, 32)
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.GPT2Config(
        n_layer=6,
        n_embd=8,
        n_head=2,
        vocab_size=9,
        n_positions=8,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return transformers.GPT2LMHeadModel(config), torch.arange(8).view(2, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    # Two blocks of layer1 are equal; those of a ViT all are; those of GPT-2 know their index.
    [("resnet18", 14), ("vit", 2), ("gpt2", 12)],
)
def test_published_models(name, expected):
    model, x = published(name)
    graphs, handle = compiled(model, x)
    settled = train(model.train(), handle, x, 15)
    assert max(graphs.of.values()) == 2
    assert graphs.count() == expected
    assert graphs.last <= settled


@pytest.mark.parametrize("name", ["cifar-resnet20", "vit"])
def test_no_gates_compile_again_in_training_or_evaluation(name):
    model, x = published(name)
    graphs, handle = compiled(model, x)
    seen = set()
    for step in range(PATTERNS):
        out = model.train()(x)
        seen.add(tuple(handle.gates.tolist()))
        if step < 20:
            getattr(out, "logits", out).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    assert len(seen) > PATTERNS / 5
    assert set(graphs.of.values()) == {3}
    assert graphs.last < 20


@pytest.mark.parametrize("name", ["cifar-resnet8", "vit"])
def test_compiled_outputs_and_gradients_are_the_interpreters(name):
    model, x = published(name)
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    compiled(model, x, backend="aot_eager")
    sd.apply(twin, sd.Uniform(0.5), example=x)
    for training in (True, False, True, True):
        for each in (model, twin):
            each.train(training).zero_grad()
        outs = [getattr(out, "logits", out) for out in (model(x), twin(x))]
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().mean().backward()
        gradients = [[p.grad for p in each.parameters()] for each in (model, twin)]
        torch.testing.assert_close(*gradients)
    assert list(model.state_dict()) == keys


def test_samples_drawn_for_subset_gates_end_in_few_graphs():
    model, x = stack(Block, EQUAL), torch.randn(6, 4, requires_grad=True)
    graphs, _ = compiled(model, x, gate="subset")
    for step in range(200):
        model(x[: 6 - 2 * (step % 2)]).sum().backward()
    assert graphs.count() <= 12
    assert graphs.last < 100


def test_balanced_subsets_are_of_one_size_and_need_one_graph():
    model, x = stack(Block, EQUAL), torch.randn(6, 4, requires_grad=True)
    graphs, _ = compiled(model, x, gate="subset", balance=True)
    for _ in range(PATTERNS):
        model(x).sum().backward()
    assert graphs.count() == 1
    assert graphs.symbolic == 0


def test_branches_that_run_forward_only_are_a_second_graph():
    model, x = stack(Block, EQUAL), torch.randn(6, 4, requires_grad=True)
    twin = copy.deepcopy(model)
    graphs, handle = compiled(model, x, closed="forward-only")
    plain = sd.apply(twin, sd.Uniform(0.5), example=x, closed="forward-only")
    for _ in range(20):
        for each in (model, twin):
            each.zero_grad()
            each(x).sum().backward()
        assert torch.equal(handle.gates, plain.gates)
        for mine, true in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, true.grad)
    assert graphs.count() == 2


def test_a_block_that_holds_what_is_cut_has_graphs_of_its_own():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.T5Config(
        vocab_size=9,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        use_cache=False,
    )
    ids = torch.arange(8).view(2, 4)
    model = transformers.T5ForConditionalGeneration(config)
    graphs, handle = compiled(model, {"input_ids": ids, "decoder_input_ids": ids})
    assert len(handle.blocks) == 4
    for _ in range(12):
        model.train()(input_ids=ids, decoder_input_ids=ids).logits.sum().backward()
    assert max(graphs.of.values()) == 2
    sd.remove(model)
    assert not any(install.is_installed(module) for module in model.modules())


def test_a_look_at_a_compiled_model_runs_it_uncompiled():
    model, x = stack(Block, EQUAL), inputs(EQUAL)
    sd.apply(model, example=x)
    before = sd.summary(model, x)
    graphs = Graphs(handle=sd.handle_of(model))
    sd.compile_blocks(model, backend=graphs)
    assert sd.summary(model, x) == before
    assert sd.verify(model, x).blocks == len(EQUAL)
    assert graphs.count() == 0
    model(x)
    assert graphs.count() > 0


def test_copies_and_what_remove_leaves_are_not_compiled():
    model, x = stack(Block, EQUAL), inputs(EQUAL)
    expected = model(x)
    graphs, _ = compiled(model, x)
    copied = copy.deepcopy(model)
    copied(x).sum().backward()
    sd.remove(model)
    assert torch.equal(model(x), expected)
    assert all(type(block) is Block for block in model)
    assert all(m._compiled_call_impl is None for m in (*model.modules(), *copied.modules()))
    assert graphs.count() == 0
    again = Graphs(handle=sd.handle_of(copied))
    sd.compile_blocks(copied, backend=again)(x)
    assert again.count() > 0


class Trunk(nn.Module):
    """A loop over layers that are PyTorch's own classes: its blocks are deferred."""

    def __init__(self, width=4):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Sequential(nn.Identity(), nn.Dropout(0.0), nn.Tanh())

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + self.last(layer(norm(x)))
        return x


def test_modules_of_pytorchs_own_in_deferred_branches_are_compiled():
    torch.manual_seed(0)
    model, x = Trunk().double().train(), torch.randn(5, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    graphs, handle = compiled(model, x)
    assert {block.mechanism for block in applied_to(model).found} == {"deferred"}
    seen = set()
    for _ in range(8):
        output, expected = model(x), x
        for norm, layer, gate in zip(twin.norms, twin.layers, handle.gates, strict=True):
            if gate:
                expected = expected + torch.tanh(layer(norm(expected)))
        torch.testing.assert_close(output, expected)
        seen.add(tuple(handle.gates.tolist()))
    assert len(seen) > 1
    assert graphs.count() >= 3


def test_a_model_compiled_as_a_whole_runs_as_its_gates_say():
    for model, f in (
        (stack(Block, [4, 4]), lambda block, x: block.linear(block.norm(x))),
        (Trunk(), None),
    ):
        torch._dynamo.reset()
        model = model.double().train()
        twin, x = copy.deepcopy(model), torch.randn(5, 4, dtype=torch.float64)
        handle = sd.apply(model, sd.Uniform(0.5), example=x)
        whole = torch.compile(model, backend="eager")
        parts = list(twin) if f else list(zip(twin.norms, twin.layers, strict=True))
        for step in range(4):
            model.zero_grad(), twin.zero_grad()
            output, expected = whole(x), x
            for part, gate in zip(parts, handle.gates, strict=True):
                branch = f(part, expected) if f else part[1](part[0](expected))
                expected = expected + gate * torch.tanh(branch)
            assert handle.step == step + 1
            torch.testing.assert_close(output, expected)
            if output.requires_grad:
                output.square().sum().backward()
            expected.square().sum().backward()
            for mine, right in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, right.grad)


def test_what_cannot_be_compiled_is_an_error():
    class Breaking(Block):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    model, x = stack(Breaking, EQUAL), inputs(EQUAL)
    with pytest.raises(
        sd.errors.ApplyError, match=r"Sequential has no stochastic depth: call sd\.apply"
    ):
        sd.compile_blocks(model)
    compiled(model, x)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        model(x)
    alone = Block(4)
    sd.apply(alone, example=x)
    with pytest.raises(sd.errors.ApplyError, match=r"Block is itself a block.*nn\.Sequential"):
        sd.compile_blocks(alone)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_is_that_of_the_interpreter(backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs g++")
    outcomes = []
    for compiling in (False, True):
        torch.manual_seed(0)
        model, x = stack(Block, [4, 4, 4]), inputs([4])
        if compiling:
            _, handle = compiled(model, x, backend=backend, scale="training")
        else:
            handle = sd.apply(model, sd.Uniform(0.5), example=x, scale="training")
        train(model, handle, x, 12)
        outcomes.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*outcomes)


def test_compiled_as_a_whole_a_model_draws_its_gates_outside_of_its_graphs():
    """In silence, where the compiler would warn of what it cannot look into."""
    torch.manual_seed(0)
    model = nn.Sequential(*(sd.Residual(nn.Linear(4, 4)) for _ in range(2)))
    plain = copy.deepcopy(model)
    handles = [sd.apply(each, [0.5, 0.5]) for each in (model, plain)]
    run, seen = torch.compile(model, backend="eager"), set()
    for _ in range(12):
        x = torch.randn(3, 4)
        outcomes = [each(x) for each in (run, plain)]
        seen.add(tuple(handles[0].gates.tolist()))
        assert torch.equal(handles[0].gates, handles[1].gates)
        assert torch.equal(*outcomes)
        for each, out in zip((model, plain), outcomes, strict=True):
            each.zero_grad()
            if out.requires_grad:
                out.sum().backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            assert mine.grad is None or torch.equal(mine.grad, other.grad)
    assert len(seen) == 4
    assert torch.equal(run.eval()(x), plain.eval()(x))


class CompiledMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)

    @torch.compile(backend="eager")
    def branch(self, x):
        return self.g(torch.tanh(self.f(x)))

    def forward(self, x):
        return x + self.branch(x)


class AddsCompiledMethods(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(CompiledMethod() for _ in range(10))

    def forward(self, x):
        for block in self.blocks:
            x = x + block.branch(x)
        return x


@pytest.mark.parametrize("gate", ["batch", "subset"])
def test_a_branch_may_call_a_method_that_the_user_compiles(gate):
    torch.manual_seed(0)
    model = nn.Sequential(*(CompiledMethod() for _ in range(3)))
    torch._dynamo.utils.counters.clear()
    handle = sd.apply(model, sd.Uniform(0.5), example=torch.randn(2, 4), gate=gate)
    assert not torch._dynamo.utils.counters["frames"]  # a function has a limited number of graphs
    x = torch.randn(6, 4)
    for mode in (True, False):
        with handle.forced([False, True, False]):
            torch.testing.assert_close(model.train(mode)(x), x + model[1].branch(x))
    assert torch._dynamo.utils.counters["frames"]["ok"]


def test_modules_that_a_compiled_method_calls_cannot_be_deferred():
    """The compiler inlines them, so that no gate would reach them, whatever number it compiles."""
    with pytest.raises(
        sd.errors.UnsupportedBlockError, match=r"'blocks\.0'.*torch\.compile.*compile_blocks"
    ):
        sd.apply(AddsCompiledMethods(), example=torch.randn(2, 4))


@torch.compile(backend="eager")
def gated(a, b):
    return torch.sigmoid(a) * b


class Gated(nn.Module):
    def forward(self, a, b):
        return gated(a, b)


class AddsCompiledFunctions(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.blocks = nn.ModuleList(CompiledMethod() for _ in range(3))
        self.between = between

    def forward(self, x):
        for block in self.blocks:
            x = x + block.g(self.between(block.f(x), x))
        return x


def test_compiled_functions_cannot_compute_with_deferred_values():
    """The compiler would trace the placeholders as if they were tensors."""
    with pytest.raises(
        sd.errors.UnsupportedBlockError, match=r"'blocks\.0'.*torch\.compile.*computes.*of a module"
    ):
        sd.apply(AddsCompiledFunctions(gated), example=torch.randn(2, 4))


def test_compiled_functions_of_a_module_are_deferred_with_it():
    torch.manual_seed(0)
    model, x = AddsCompiledFunctions(Gated()), torch.randn(6, 4)
    handle = sd.apply(model, sd.Uniform(0.5), example=torch.randn(2, 4))
    with handle.forced([False, True, False]):
        block = model.blocks[1]
        torch.testing.assert_close(model(x), x + block.g(gated(block.f(x), x)))
