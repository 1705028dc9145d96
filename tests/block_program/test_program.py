"""The block program against autograd: the same network, gates, mini-batches and optimizer."""

import itertools
import math
from functools import partial

import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.block_program import Eagerly, Program
from stochastic_depth.block_program.kernels import Kernels
from stochastic_depth.models import CifarResNet, DenseNet
from stochastic_depth.train.build import build_optimizer, first_convolution
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Runtime("cpu", "float32", 1)


class Counting(Kernels):
    """Counts what is convolved forward, and how often it goes backward."""

    def __init__(self):
        self.forward = self.backward = 0

    def convolve(self, x, layer):
        self.forward += 1
        return super().convolve(x, layer)

    def convolve_backward(self, *args, **options):
        self.backward += 1
        return super().convolve_backward(*args, **options)


def mini_batch(step, images=4, size=8, dtype=torch.float64):
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(images, 3, size, size, generator=rng, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(images) % 10


def network(blocks, survival=None, dtype=torch.float64, init="he", **options):
    model = CifarResNet(2 * blocks + 2, init=init).to(dtype, memory_format=torch.channels_last)
    depth = None if survival is None else sd.apply(model, survival, **options)
    return model.train(), depth, build_optimizer(OptimizerConfig(), model)


def programmed(blocks, survival=None, dtype=torch.float64, kernels=None, replay=None, **options):
    model, handle, optimizer = network(blocks, survival, dtype, **options)
    shape = mini_batch(0)[0].shape
    return model, optimizer, Program(model, handle, optimizer, shape, dtype, kernels, replay)


class Doubled(CifarResNet):
    """A network with a forward method of its own, which the program does not know."""

    def forward(self, images):
        return 2 * super().forward(images)


class Statically:
    """As CUDA graphs are: warmed up, and with memory that is never given back."""

    is_fixed = True

    def warm_up(self, work):
        work()

    def __call__(self, work):
        return work


def poison(program):
    """NaN in all that a step must write before it reads."""
    blocks = program.blocks
    written = [*program.gradients, program.images, program.flat.gradients, *program.buffers]
    written += [program.stem.x, program.head.x, *(block.out for block in blocks)]
    written += [tensor for block in blocks for tensor in block.saved]
    for tensor in written:
        tensor.fill_(math.nan)


def autograd_step(model, optimizer, images, labels):
    return train_step(model, optimizer, images, labels, first_convolution(model), CPU).loss


def assert_same_values(mine, theirs, **tolerance):
    for name, expected in theirs.items():
        torch.testing.assert_close(
            mine[name], expected, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def assert_same_state(mine, theirs, **tolerance):
    assert_same_values(mine[0].state_dict(), theirs[0].state_dict(), **tolerance)
    momenta = (
        [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        for model, optimizer in (mine, theirs)
    )
    for a, b in zip(*momenta, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("replay", [Eagerly(), Statically()])
@pytest.mark.parametrize("pattern", list(itertools.product([True, False], repeat=6)))
def test_every_pattern_of_six_blocks_is_autograds(pattern, replay):
    counting = Counting()
    model, optimizer, program = programmed(6, sd.Uniform(0.5), kernels=counting, replay=replay)
    counting.forward = counting.backward = 0
    twin, handle, twins_optimizer = network(6, sd.Uniform(0.5))
    with program.handle.forced(pattern), handle.forced(pattern):
        for step in range(2):
            images, labels = mini_batch(step)
            poison(program)
            loss = program.step(images, labels)
            torch.testing.assert_close(loss, autograd_step(twin, twins_optimizer, images, labels))
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(program.flat.view(p, program.flat.gradients), q.grad)
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-12, atol=1e-14)
    assert counting.forward == counting.backward == 2 * (1 + 2 * sum(pattern))


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_without_momentum_steps_are_those_of_plain_gradient_descent(skipped):
    options = {"skipped": skipped, "seed": 3}
    config = OptimizerConfig(momentum=0)
    models = []
    for kind in ("program", "autograd", "pytorch"):
        model, handle, _ = network(6, sd.Uniform(0.5), **options)
        optimizer = build_optimizer(config, model)
        if kind == "pytorch":
            optimizer = torch.optim.SGD(
                model.parameters(), config.learning_rate, weight_decay=config.weight_decay
            )
        if kind == "program":
            shape = mini_batch(0)[0].shape
            program = Program(model, handle, optimizer, shape, torch.float64)
            step = program.step
        else:
            step = partial(autograd_step, model, optimizer)
        for number in range(4):
            step(*mini_batch(number))
        models.append(model.state_dict())
    assert_same_values(models[0], models[2], rtol=1e-10, atol=1e-12)
    assert_same_values(models[1], models[2], rtol=0, atol=0)


@pytest.mark.parametrize("replay", [Eagerly(), Statically()])
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize("scale", ["inference", "training"])
def test_random_patterns_of_54_blocks_are_autograds(scale, skipped, replay):
    options = {"scale": scale, "skipped": skipped, "seed": 3, "init": "zero-gain"}
    options["schedule"] = sd.Warmup(4)
    rule = sd.LinearDecay(0.5)
    model, optimizer, program = programmed(54, rule, replay=replay, **options)
    twin, handle, twins_optimizer = network(54, rule, **options)
    for step in range(6):
        images, labels = mini_batch(step)
        poison(program)
        loss = program.step(images, labels)
        torch.testing.assert_close(loss, autograd_step(twin, twins_optimizer, images, labels))
        assert program.handle.gates.equal(handle.gates)
    assert not handle.gates.all()
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-9, atol=1e-12)


def in_full_depth(handle):
    return handle.full_depth()


def with_all_open(handle):
    return handle.forced([True] * 6)


@pytest.mark.parametrize("context", [in_full_depth, with_all_open])
def test_gates_that_are_not_drawn_are_scaled_as_autograds(context):
    options = {"scale": "training", "schedule": sd.Decreasing(9, 10)}  # the last block has p_l = 0
    model, optimizer, program = programmed(6, sd.LinearDecay(0), **options)
    twin, handle, twins_optimizer = network(6, sd.LinearDecay(0), **options)
    with context(program.handle), context(handle):
        images, labels = mini_batch(0)
        loss = program.step(images, labels)
        torch.testing.assert_close(loss, autograd_step(twin, twins_optimizer, images, labels))
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "context", [in_full_depth, lambda handle: handle.forced([True] * 6, scaled=True)]
)
def test_the_scaling_of_evaluation_is_refused_in_a_step(context):
    _, _, program = programmed(6, sd.Uniform(0.5))
    program.step(*mini_batch(0))
    with context(program.handle), pytest.raises(sd.errors.EngineError, match="by p_l"):
        program.step(*mini_batch(1))


@pytest.mark.parametrize("part", ["", "stem.1", "blocks.2.branch.4"])
def test_a_step_in_evaluation_mode_is_refused_before_it_changes_anything(part):
    model, optimizer, program = programmed(6, sd.Uniform(0.5))
    twin, twins_optimizer, twins_program = programmed(6, sd.Uniform(0.5))
    model.get_submodule(part).eval()
    with pytest.raises(sd.errors.EngineError, match=r"in evaluation mode: call model\.train\(\)"):
        program.step(*mini_batch(0))
    model.train()
    assert torch.equal(program.step(*mini_batch(0)), twins_program.step(*mini_batch(0)))
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=0, atol=0)


def test_with_memory_of_its_own_nothing_is_left_from_warming_up():
    model, handle, optimizer = network(6, sd.Uniform(0.5))
    twin, _, twins_optimizer = network(6, sd.Uniform(0.5))
    shape = mini_batch(0)[0].shape
    state = torch.random.get_rng_state()
    program = Program(model, handle, optimizer, shape, torch.float64, replay=Statically())
    assert torch.random.get_rng_state().equal(state)
    assert_same_values(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    for step in range(4):
        images, labels = mini_batch(step)
        poison(program)
        program.step(images, labels)
        autograd_step(twin, twins_optimizer, images, labels)
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("replay", [Eagerly(), Statically()])
@pytest.mark.parametrize("closed", [0, 2, 5])
def test_a_skipped_block_saves_nothing_for_backward(closed, replay):
    saved = []
    for pattern in ([True] * 6, [i != closed for i in range(6)]):
        _, _, program = programmed(6, sd.Uniform(0.5), replay=replay)
        with program.handle.forced(pattern):
            program.step(*mini_batch(0))
        saved.append(program.bytes_saved)
    block = program.blocks[closed]
    inner = program.blocks[closed].gradient_out.nbytes * 3  # two convolutions, and between them
    out = 0 if replay.is_fixed or block.is_transition else block.gradient_out.nbytes
    assert saved[0] - saved[1] == inner + out


def test_memory_is_asked_for_once():
    _, _, program = programmed(6, sd.Uniform(0.5))
    addresses = []
    with program.handle.forced([True] * 6):
        for step in range(3):
            program.step(*mini_batch(step))
            addresses.append({tensor.data_ptr() for tensor in program.buffers})
    assert len(addresses[0]) == 6
    assert addresses[0] == addresses[1] == addresses[2]


def test_without_stochastic_depth_all_blocks_run():
    counting = Counting()
    model, optimizer, program = programmed(9, kernels=counting)
    twin, _, twins_optimizer = network(9)
    images, labels = mini_batch(0)
    program.step(images, labels)
    autograd_step(twin, twins_optimizer, images, labels)
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-12, atol=1e-14)
    assert counting.forward == 19


def test_autograd_and_the_program_take_turns_on_one_network():
    model, optimizer, program = programmed(6, sd.Uniform(0.5), seed=1)
    twin, handle, twins_optimizer = network(6, sd.Uniform(0.5), seed=1)
    for step in range(6):
        images, labels = mini_batch(step, images=4 if step % 2 else 2)
        if step % 2:
            program.step(images, labels)
        else:
            autograd_step(model, optimizer, images, labels)
        autograd_step(twin, twins_optimizer, images, labels)
        with torch.no_grad():
            model.eval()(images), twin.eval()(images)
        model.train(), twin.train()
    assert program.handle.step == handle.step == 6
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-10, atol=1e-12)


def test_momentum_of_earlier_steps_is_taken_over():
    (model, depth, optimizer), (twin, _, twins_optimizer) = network(3), network(3)
    batches = [mini_batch(step) for step in range(3)]
    autograd_step(model, optimizer, *batches[0])
    program = Program(model, depth, optimizer, batches[0][0].shape, torch.float64)
    for images, labels in batches[1:]:
        program.step(images, labels)
    for images, labels in batches:
        autograd_step(twin, twins_optimizer, images, labels)
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-12, atol=1e-14)


def test_a_changed_learning_rate_counts():
    (model, depth, optimizer), (twin, _, twins_optimizer) = network(3), network(3)
    program = Program(model, depth, optimizer, mini_batch(0)[0].shape, torch.float64)
    for step, rate in enumerate((0.1, 0.01)):
        optimizer.param_groups[0]["lr"] = twins_optimizer.param_groups[0]["lr"] = rate
        program.step(*mini_batch(step))
        autograd_step(twin, twins_optimizer, *mini_batch(step))
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-12, atol=1e-14)


def test_bfloat16_is_that_of_autocast():
    model, handle, optimizer = network(9, sd.Uniform(0.7), torch.float32, init="zero-gain")
    twin, _, twins_optimizer = network(9, sd.Uniform(0.7), torch.float32, init="zero-gain")
    images, labels = mini_batch(0, images=16, dtype=torch.float32)
    program = Program(model, handle, optimizer, images.shape, torch.bfloat16)
    runtime = Runtime("cpu", "bfloat16", 1)
    for _ in range(3):
        mine = program.step(images, labels)
        theirs = train_step(
            twin, twins_optimizer, images, labels, first_convolution(twin), runtime
        ).loss
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: (DenseNet(10, 4), None), "DenseNet"),
        (lambda: (Doubled(8), None), "Doubled"),
        (lambda: network(3, sd.Uniform(0.5), gate="sample")[:2], 'gate="batch"'),
        (
            lambda: network(3, sd.Uniform(0.5), closed="forward-only", scale=None)[:2],
            'closed="forward-only": use --engine eager',
        ),
    ],
)
def test_what_it_was_not_written_for_is_refused(build, named):
    model, handle = build()
    optimizer = build_optimizer(OptimizerConfig(), model)
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(sd.errors.EngineError, match=named):
        Program(model, handle, optimizer, (4, 3, 8, 8), torch.float32)
    assert [p.data_ptr() for p in model.parameters()] == before


def test_other_optimizers_are_refused():
    model, handle, _ = network(3)
    with pytest.raises(sd.errors.EngineError, match="this is AdamW with 1: use --engine eager"):
        Program(model, handle, torch.optim.AdamW(model.parameters()), (4, 3, 8, 8), torch.float64)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_parameter_that_is_not_trained_is_named(frozen):
    model, handle, _ = network(3)
    model.stem[0].weight.requires_grad_(not frozen)
    trained = [p for p in model.parameters() if frozen or p is not model.stem[0].weight]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    with pytest.raises(sd.errors.EngineError, match=r"'stem\.0\.weight' is frozen, or not"):
        Program(model, handle, optimizer, (4, 3, 8, 8), torch.float64)


def test_dampening_is_refused():
    model, handle, _ = network(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    with pytest.raises(sd.errors.EngineError, match=r"dampening=0\.5: use --engine eager"):
        Program(model, handle, optimizer, (4, 3, 8, 8), torch.float64)


def test_all_other_settings_of_sgd_are_followed_even_if_they_change():
    def built():
        model = network(3)[0]
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1, maximize=True
        )
        return model, optimizer

    model, optimizer = built()
    twin, twins_optimizer = built()
    program = Program(model, None, optimizer, (4, 3, 8, 8), torch.float64)
    for step in range(3):
        images, labels = mini_batch(step)
        program.step(images, labels)
        autograd_step(twin, twins_optimizer, images, labels)
        for each in (optimizer, twins_optimizer):
            each.param_groups[0].update(momentum=0.5, weight_decay=0.01, nesterov=True)
    assert_same_state((model, optimizer), (twin, twins_optimizer), rtol=1e-12, atol=1e-14)
