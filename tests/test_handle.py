import copy
import json
import math
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.draw import draw

BLOCKS = 6
HALF = sd.LinearDecay(0.5)
pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Six residual blocks of a linear layer and a normalisation, in float64.

    `recompute` names what is wrapped in activation checkpointing: nothing, each block, or the
    first four blocks as one segment.
    """

    def __init__(self, recompute: str = "nothing", reentrant: bool = False) -> None:
        super().__init__()
        self.recompute, self.reentrant = recompute, reentrant
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.Sequential(
            *(
                sd.Residual(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()))
                for _ in range(BLOCKS)
            )
        )
        self.head = nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        parts = {
            "nothing": list(self.blocks),
            "blocks": list(self.blocks),
            "segment": [self.blocks[:4], *self.blocks[4:]],
        }[self.recompute]
        for part in parts:
            if self.recompute == "blocks" or (part is parts[0] and self.recompute == "segment"):
                h = checkpoint(part, h, use_reentrant=self.reentrant)
            else:
                h = part(h)
        return self.head(h)


def batch(step: int) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return torch.randn(5, 3, dtype=torch.float64, generator=rng)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> bool:
    return one.keys() == other.keys() and all(
        (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def test_the_forward_pass_draws_the_gates_of_its_seed_and_step() -> None:
    model = Net()
    handle = sd.apply(model, HALF, seed=3)
    ran: list[int] = []
    for block, unit in enumerate(model.blocks):
        unit.branch.register_forward_hook(lambda *_, block=block: ran.append(block))
    for step in range(30):
        ran.clear()
        model(batch(step))
        expected = draw(3, step, handle.survival)
        assert torch.equal(handle.gates, expected)
        assert ran == expected.nonzero().flatten().tolist()
        assert handle.step == step + 1


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_gates_for_single_samples_are_drawn_for_the_batch(gate) -> None:
    model = Net()
    handle = sd.apply(model, HALF, gate=gate, seed=3)
    for samples in (5, 2):
        model(batch(0)[:samples])
        assert torch.equal(handle.gates, draw(3, handle.step - 1, handle.survival, samples))


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("schedule", [None, sd.Warmup(4)])
def test_the_gates_of_any_step_can_be_asked_for(gate, schedule) -> None:
    model = Net()
    handle = sd.apply(model, sd.Uniform(0.3), schedule=schedule, gate=gate, seed=5)
    before = [handle.gates_at(step, 7) for step in range(6)]
    for step in range(6):
        model(torch.randn(7, 3, dtype=torch.float64))
        assert torch.equal(handle.gates, before[step])
        assert torch.equal(handle.gates, handle.gates_at(step, 7))


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_a_model_may_be_called_with_keywords_only(gate) -> None:
    model = Net()
    handle = sd.apply(model, HALF, gate=gate)
    model(x=batch(0))
    assert handle.gates.shape == (BLOCKS, 5)


def test_gates_for_single_samples_need_a_tensor_among_the_inputs() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = sd.Residual(nn.Linear(2, 2))

        def forward(self) -> Tensor:
            return self.unit(torch.ones(1, 2))

    model = Constant()
    handle = sd.apply(model, HALF, gate="sample")
    with pytest.raises(
        sd.errors.GateError, match=r"single samples need a tensor \[batch, \.\.\.\]"
    ):
        model()
    for without_batch in (handle.draw, partial(handle.gates_at, 0)):
        with pytest.raises(sd.errors.GateError, match=r"handle\.gates_at\(step, batch\)"):
            without_batch()


def test_evaluation_draws_nothing_and_advances_nothing() -> None:
    model = Net()
    handle = sd.apply(model, HALF)
    model(batch(0))
    gates = handle.gates
    model.eval()
    assert torch.equal(model(batch(1)), model(batch(1)))
    assert handle.step == 1
    assert torch.equal(handle.gates, gates)
    model.train()(batch(2))
    assert torch.equal(handle.gates, draw(0, 1, handle.survival))


def test_the_handle_tells_survival_expected_depth_and_gates() -> None:
    model = Net()
    handle = sd.apply(model, HALF)
    assert handle.survival == pytest.approx([11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, 1 / 2])
    assert handle.expected_depth == pytest.approx((3 * BLOCKS - 1) / 4)
    with pytest.raises(sd.errors.GateError, match="first training forward"):
        _ = handle.gates
    model(batch(0))
    handle.gates.zero_()
    assert torch.equal(handle.gates, draw(0, 0, handle.survival)), "the caller got a copy"
    assert "6 blocks" in repr(handle)
    assert "\n" not in repr(handle.blocks[0]), "the modules of a block are not printed"


def test_the_global_random_state_is_untouched() -> None:
    model = Net()
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    sd.apply(model, HALF)
    for step in range(3):
        model(batch(step)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_a_block_called_before_any_draw_is_an_error() -> None:
    model = Net()
    handle = sd.apply(model, HALF)
    h = torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(sd.errors.GateError, match="no gates are drawn for it: call that model"):
        model.blocks[0](h)
    with handle.draw():
        model.blocks(h)
    for block in model.blocks:
        with pytest.raises(sd.errors.GateError, match=r"with handle\.draw\(\): "):
            block(h)
    model.eval()
    model(batch(0))
    with pytest.raises(sd.errors.GateError, match="no gates are drawn for it: call that model"):
        model.blocks[0].train()(h)


@pytest.mark.parametrize("schedule", [None, sd.Warmup(10)])
def test_a_resumed_run_draws_the_same_gates(schedule) -> None:
    model = Net()
    handle = sd.apply(model, HALF, schedule=schedule, seed=9)
    for step in range(4):
        model(batch(step))
    state = json.loads(json.dumps(handle.state_dict()))
    evaluation = copy.deepcopy(model).eval()(batch(0))
    resumed = Net()
    resumed.load_state_dict(model.state_dict())
    again = sd.apply(resumed, HALF, schedule=schedule, seed=0)
    again.load_state_dict(state)
    assert torch.equal(copy.deepcopy(resumed).eval()(batch(0)), evaluation)
    for step in range(4, 20):
        assert torch.equal(resumed(batch(step)), model(batch(step)))
        assert torch.equal(again.gates, handle.gates)
    assert again.state_dict() == handle.state_dict()


def test_a_state_of_one_step_ago_brings_back_the_probabilities_of_then() -> None:
    model = Net()
    handle = sd.apply(model, HALF, schedule=sd.Steps({4: 1.0}))
    for step in range(4):
        model.train()(batch(step))
    state, before = handle.state_dict(), handle.survival
    evaluation = model.eval()(batch(0))
    model.train()(batch(4))
    assert handle.survival != before
    handle.load_state_dict(state)
    assert handle.survival == before
    assert torch.equal(model.eval()(batch(0)), evaluation)


@dataclass(frozen=True)
class Product:
    """A schedule with a field of each kind."""

    first: Callable[[int], float]
    points: tuple[tuple[int, float], ...]
    names: dict[str, tuple[int, ...]]
    scale: float

    def __call__(self, step: int) -> float:
        return 1.0


@pytest.mark.parametrize("first", [sd.Warmup(3), math.exp])
def test_a_schedule_of_the_users_own_is_saved_as_plain_values(first) -> None:
    schedule = Product(first, ((0, 0.5), (10, 1.0)), {"a": (1, 2)}, np.float32(0.5))
    handle = sd.apply(Net(), HALF, schedule=schedule)
    state = json.loads(json.dumps(handle.state_dict()))
    assert state == handle.state_dict()
    handle.load_state_dict(state)
    assert state["schedule"]["points"] == [[0, 0.5], [10, 1.0]]


def test_no_gates_are_open_between_a_load_and_the_next_forward_pass() -> None:
    model = Net()
    handle = sd.apply(model, HALF)
    model(batch(0))
    handle.load_state_dict(handle.state_dict())
    with pytest.raises(
        sd.errors.GateError, match="no gates yet: they are drawn by the first training"
    ):
        _ = handle.gates
    with pytest.raises(sd.errors.GateError, match="outside of a forward pass of the model"):
        model.blocks[0](torch.randn(5, 4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("survival", {"survival": sd.LinearDecay(0.6)}),
        ("schedule", {"schedule": sd.Warmup(5)}),
        ("closed", {"closed": "forward-only"}),
        ("gate", {"gate": "sample"}),
        ("scale", {"scale": "training"}),
        ("skipped", {"skipped": "freeze"}),
    ],
)
def test_a_foreign_state_is_an_error_that_names_the_field(field: str, settings: dict) -> None:
    foreign = sd.apply(Net(), **{"survival": HALF, **settings}).state_dict()
    handle = sd.apply(Net(), HALF, seed=4)
    before = handle.state_dict()
    with pytest.raises(sd.errors.StateError, match=rf"saved state has {field}="):
        handle.load_state_dict(foreign)
    assert handle.state_dict() == before


def test_rules_of_one_name_are_told_apart_by_their_probabilities() -> None:
    def constant(p: float) -> Callable[[int, int, int], float]:
        return lambda block, blocks, step: p

    state = sd.apply(Net(), constant(0.5)).state_dict()
    sd.apply(Net(), constant(0.5)).load_state_dict(state)
    with pytest.raises(sd.errors.StateError, match="saved state has survival="):
        sd.apply(Net(), constant(0.6)).load_state_dict(state)


def test_a_state_with_a_negative_step_is_an_error() -> None:
    handle = sd.apply(Net(), HALF)
    with pytest.raises(sd.errors.StateError, match="the saved state has step=-1"):
        handle.load_state_dict({**handle.state_dict(), "step": -1})


def test_with_a_step_of_its_own_each_micro_batch_asks_the_schedule_once() -> None:
    asked = []
    handle = sd.apply(model := Net(), HALF, schedule=lambda step: asked.append(step) or 0.5)
    for step in range(3):
        for _ in range(2):
            asked.clear()
            handle.step = step
            model.train()(torch.randn(5, 3, dtype=torch.float64))
            assert asked == [step]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_every_draw_is_for_the_step_of_an_optimizer_that_is_followed_and_a_copy_follows_none(
    copied,
) -> None:
    handle = sd.apply(model := Net(), HALF)
    steps = [7]
    handle.optimizer_steps = lambda: steps[0]
    for steps[0] in (7, 8):
        for _ in range(2):
            model.train()(batch(0))
            assert torch.equal(handle.gates, draw(0, steps[0], handle.survival))
            with handle.draw():
                assert torch.equal(handle.gates, draw(0, steps[0], handle.survival))
    assert handle.step == 9
    _, other = copied((model, handle))
    for step in (9, 10):
        other.draw()
        assert torch.equal(other.gates, draw(0, step, other.survival))


@pytest.mark.parametrize("field", ["seed", "step", "survival", "gate"])
def test_a_state_without_a_field_is_an_error_that_names_it(field: str) -> None:
    handle = sd.apply(Net(), HALF)
    state = handle.state_dict()
    del state[field]
    with pytest.raises(sd.errors.StateError, match=rf"saved state has {field}=None"):
        handle.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_of_the_model_draws_the_same_sequence_by_itself(copied) -> None:
    model = Net()
    handle = sd.apply(model, HALF, seed=2)
    model(batch(0))
    other, other_depth = copied((model, handle))
    for step in range(1, 12):
        other(batch(step)).sum().backward()
    assert (handle.step, other_depth.step) == (1, 12)
    assert torch.equal(handle.gates, draw(2, 0, handle.survival))
    assert all(p.grad is None for p in model.parameters())
    assert {id(block.gates[0]) for block in other_depth.blocks} == {
        id(unit.gates) for unit in other.blocks
    }
    for step in range(1, 12):
        model(batch(step))
    assert torch.equal(handle.gates, other_depth.gates)
    sd.remove(other)
    model(batch(0))
    assert handle.step == 13
    assert other_depth.step == 12


def test_a_copy_of_a_block_holds_no_other_block() -> None:
    model = Net()
    sd.apply(model, HALF)
    alone = len(pickle.dumps(Net().blocks[0]))
    model(batch(0)).sum().backward()
    assert len(pickle.dumps(model.blocks[0])) < 2 * alone
    copied, x = copy.deepcopy(model.blocks[0]), torch.randn(5, 4, dtype=torch.float64)
    assert torch.equal(copied.eval()(x), model.blocks[0].eval()(x))


@pytest.mark.parametrize("clear", ["before", "between", "never"])
def test_paper_gives_the_parameters_of_closed_blocks_zero_gradients(clear: str) -> None:
    model = Net()
    handle = sd.apply(model, HALF, skipped="paper")
    closed_once = False
    for step in range(12):
        if clear == "before":
            model.zero_grad(set_to_none=True)
        loss = model(batch(step)).square().sum()
        if clear == "between":
            model.zero_grad(set_to_none=True)
        if clear == "never":
            before = gradients(model)
        loss.backward()
        for block, unit in enumerate(model.blocks):
            for name, parameter in unit.named_parameters():
                if handle.gates[block]:
                    assert parameter.grad is not None
                elif clear == "never":
                    earlier = before[f"blocks.{block}.{name}"]
                    earlier = torch.zeros_like(parameter) if earlier is None else earlier
                    assert torch.equal(parameter.grad, earlier)
                else:
                    closed_once = True
                    assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert closed_once or clear == "never"


def test_paper_lets_momentum_and_weight_decay_move_closed_blocks_by_the_closed_formula() -> None:
    lr, momentum, decay = 0.01, 0.9, 0.1
    model = Net()
    handle = sd.apply(model, HALF, skipped="paper")
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, weight_decay=decay)
    moved = 0
    for step in range(25):
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        weights = {p: p.detach().clone() for p in model.parameters()}
        velocity = {p: optimizer.state[p].get("momentum_buffer", torch.zeros(())) for p in weights}
        velocity = {p: v.clone() for p, v in velocity.items()}
        optimizer.step()
        for is_open, unit in zip(handle.gates.tolist(), model.blocks, strict=True):
            for p in unit.parameters() if not is_open else ():
                expected = weights[p] - lr * (momentum * velocity[p] + decay * weights[p])
                torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-15)
                moved += not torch.equal(p, weights[p])
    assert moved > 50


def trained_in_backward(model: nn.Module) -> dict[nn.Parameter, int]:
    """Let an optimizer of each parameter step when its gradient is there; counts the steps."""
    steps = dict.fromkeys(model.parameters(), 0)

    def step(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        steps[parameter] += parameter.grad is not None
        optimizer.step()
        optimizer.zero_grad()

    for p in steps:
        optimizer = torch.optim.SGD([p], 0.05, momentum=0.9, weight_decay=0.1)
        p.register_post_accumulate_grad_hook(partial(step, optimizer=optimizer))
    return steps


class Tied(nn.Module):
    """Blocks on an input without a gradient; the first and the last have the same weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(sd.Residual(nn.Linear(3, 3)) for _ in range(BLOCKS)))
        self.blocks[-1].branch.weight = self.blocks[0].branch.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
@pytest.mark.parametrize(
    ("make", "passes"),
    [
        *((make, n) for make in (Net, Tied) for n in (1, 3)),
        *((partial(Net, part, False), n) for part in ("blocks", "segment") for n in (1, 3)),
        (partial(Net, "blocks", True), 1),  # of several passes, each steps: they accumulate apart
    ],
)
def test_an_optimizer_that_steps_in_the_backward_pass_moves_what_a_loop_moves(
    make, passes, skipped
) -> None:
    loop, hooked = make(), make()
    for model in (loop, hooked):
        sd.apply(model, sd.Uniform(0.3), skipped=skipped)
    optimizer = torch.optim.SGD(loop.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    steps = trained_in_backward(hooked)
    for step in range(8):
        for model in (loop, hooked):
            losses = [model(batch(passes * step + n)).square().mean() for n in range(passes)]
            sum(losses).backward()
        moved = [p.grad is not None for p in loop.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert list(steps.values()) == moved, step
        steps.update(dict.fromkeys(steps, 0))
        for one, other in zip(loop.parameters(), hooked.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_freeze_leaves_closed_blocks_without_gradient_and_unmoved() -> None:
    model = Net()
    handle = sd.apply(model, HALF, skipped="freeze")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=0.1)
    frozen = 0
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        model(batch(step)).square().mean().backward()
        before = copy.deepcopy(model.blocks)
        optimizer.step()
        for is_open, unit, old in zip(handle.gates, model.blocks, before, strict=True):
            for p, q in zip(unit.parameters(), old.parameters(), strict=True):
                assert (p.grad is None) != bool(is_open)
                assert torch.equal(p, q) != bool(is_open)
                frozen += not is_open
    assert frozen > 0


def test_parameters_that_need_no_gradient_get_none() -> None:
    model = Net()
    model.blocks.requires_grad_(False)
    sd.apply(model, sd.Uniform(0.01))
    model(batch(0)).sum().backward()
    assert all(p.grad is None for p in model.blocks.parameters())


@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_gradients_accumulate_over_micro_batches(skipped) -> None:
    def one(step: int) -> dict[str, Tensor | None]:
        model = Net()
        sd.apply(model, HALF, skipped=skipped).step = step
        model(batch(step)).square().sum().backward()
        return gradients(model)

    model = Net()
    handle = sd.apply(model, HALF, skipped=skipped)
    patterns = []
    for step in (0, 1, 2, 3):
        if step % 2 == 0:
            model.zero_grad()
            patterns = []
        model(batch(step)).square().sum().backward()
        patterns.append(handle.gates)
        if step % 2 == 0:
            continue
        first, second = one(step - 1), one(step)
        for name, parameter in model.named_parameters():
            parts = [part for part in (first[name], second[name]) if part is not None]
            if not parts:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, sum(parts), rtol=1e-12, atol=1e-15)
    assert not torch.equal(*patterns)


@pytest.mark.parametrize("kind", ["dict", "tuple", "nested"])
def test_outputs_may_be_structures(kind: str) -> None:
    class Structured(Net):
        def forward(self, x: Tensor):
            out = super().forward(x)
            return {
                "dict": {"logits": out, "size": 5},
                "tuple": (None, out, out.detach()),
                "nested": [{"logits": (out,)}],
            }[kind]

    model = Structured()
    handle = sd.apply(model, sd.Uniform(0.3))
    out = model(batch(0))
    logits = {
        "dict": lambda: out["logits"],
        "tuple": lambda: out[1],
        "nested": lambda: out[0]["logits"][0],
    }[kind]()
    logits.sum().backward()
    closed = [unit for unit, b in zip(model.blocks, handle.gates, strict=True) if not b]
    assert closed
    for unit in closed:
        for parameter in unit.parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


reentrant_or_not = pytest.mark.parametrize("reentrant", [False, True])
recomputed = pytest.mark.parametrize("recompute", ["blocks", "segment"])


@reentrant_or_not
@recomputed
@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_checkpointing_gives_the_same_gradients(recompute, reentrant, gate, skipped) -> None:
    plain, model = Net(), Net(recompute, reentrant)
    depths = [sd.apply(m, HALF, gate=gate, skipped=skipped) for m in (plain, model)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, 0.9) for m in (plain, model)]
    for step in range(15):
        for m, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            m(batch(step)).square().sum().backward()
        assert same(gradients(plain), gradients(model)), step
        for optimizer in optimizers:
            optimizer.step()
    assert [handle.step for handle in depths] == [15, 15]


@reentrant_or_not
@recomputed
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_two_forward_passes_are_recomputed_each_under_its_own_gates(
    recompute, reentrant, skipped
) -> None:
    plain, model = Net(), Net(recompute, reentrant)
    for m in (plain, model):
        sd.apply(m, HALF, skipped=skipped)
    for step in range(0, 20, 2):
        for m in (plain, model):
            m.zero_grad()
            losses = [m(batch(s)).square().sum() for s in (step, step + 1)]
            sum(losses).backward()
        assert same(gradients(plain), gradients(model)), step


@reentrant_or_not
@recomputed
def test_evaluation_between_forward_and_backward_changes_nothing(recompute, reentrant) -> None:
    plain, model = Net(), Net(recompute, reentrant)
    for m in (plain, model):
        sd.apply(m, HALF)
    for step in range(10):
        for m in (plain, model):
            m.zero_grad()
            loss = m(batch(step)).square().sum()
            if m is model:
                m.eval()(batch(99))
                m.train()
            loss.backward()
        assert same(gradients(plain), gradients(model)), step


class Larger(nn.Module):
    """A network that recomputes the whole of the applied one."""

    def __init__(self, recompute: bool, reentrant: bool) -> None:
        super().__init__()
        self.body = Net()
        self.first = nn.Linear(3, 3).double()
        self.recompute, self.reentrant = recompute, reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.recompute:
            return checkpoint(self.body, h, use_reentrant=self.reentrant)
        return self.body(h)


def larger_twins(reentrant: bool, skipped: str) -> tuple[list[Larger], list[sd.Handle]]:
    twins = [Larger(False, reentrant), Larger(True, reentrant)]
    twins[1].load_state_dict(twins[0].state_dict())
    return twins, [sd.apply(m.body, HALF, skipped=skipped) for m in twins]


@reentrant_or_not
@pytest.mark.parametrize("skipped", ["paper", "freeze"])
def test_a_recomputed_model_does_not_draw_again(reentrant, skipped) -> None:
    twins, depths = larger_twins(reentrant, skipped)
    for step in range(10):
        for m in twins:
            m.zero_grad()
            m(batch(step)).square().sum().backward()
        assert same(gradients(twins[0]), gradients(twins[1])), step
        assert [handle.step for handle in depths] == [step + 1] * 2


@reentrant_or_not
def test_a_model_recomputed_after_two_forward_passes_is_right(reentrant) -> None:
    twins, _ = larger_twins(reentrant, "freeze")
    for step in range(10):
        for m in twins:
            m.zero_grad()
            (m(batch(step)).square().sum() + m(batch(step + 50)).sum()).backward()
        assert same(gradients(twins[0]), gradients(twins[1])), step


def test_where_reentrant_checkpointing_cannot_tell_which_it_is_refused() -> None:
    model = Net()
    sd.apply(model, HALF)

    def twice(x: Tensor) -> Tensor:
        return model(x) + model(x + 1)

    loss = checkpoint(twice, batch(0).requires_grad_(), use_reentrant=True).sum()
    with pytest.raises(sd.errors.GateError, match="use_reentrant=False"):
        loss.backward()


@pytest.mark.parametrize("scale", ["inference", "training"])
def test_a_schedule_is_followed_step_by_step_in_training_and_evaluation(scale) -> None:
    model = Net()
    handle = sd.apply(model, HALF, schedule=sd.Warmup(4), scale=scale)
    final = torch.tensor([11, 10, 9, 8, 7, 6], dtype=torch.float64) / 12
    for step in range(6):
        model.train()(batch(step))
        p = 1 - min(step, 4) / 4 * (1 - final)
        assert handle.survival == pytest.approx(p.tolist())
        assert handle.expected_depth == pytest.approx(p.sum().item())
        assert torch.equal(handle.gates, draw(0, step, handle.survival))
        if step == 0:
            assert handle.gates.all()
        model.eval()
        h = model.stem(batch(7))
        for unit, p_l in zip(model.blocks, p, strict=True):
            h = h + (p_l if scale == "inference" else 1) * unit.branch(h)
        torch.testing.assert_close(model(batch(7)), model.head(h), rtol=1e-12, atol=1e-12)
