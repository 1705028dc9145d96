"""The shapes of deferred values are inferred without a trace: nothing of the model is changed."""

import copy
import gc
import itertools
import random
import threading
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.surgery.applied import applied_to
from stochastic_depth.surgery.deferred import shapes

pytestmark = pytest.mark.usefixtures("one_thread")


class Record:
    def __init__(self) -> None:
        self.calls = 0


class Branch(nn.Module):
    """Counts its calls in all places that a module has."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros(8))
        self.calls: list[float] = []
        self.record, self.kept = Record(), torch.zeros(3)
        self.hidden = [nn.BatchNorm1d(6)]  # no child

    def forward(self, x: Tensor, weight: float, notes: list[int]) -> Tensor:
        self.count += 1
        self.kept += 1
        self.calls.append(weight)
        self.record.calls += 1
        notes.append(len(x))
        return self.hidden[0](self.norm(self.linear(x)) + random.random()) * weight

    def state(self) -> list[object]:
        norms = [self.norm, *self.hidden]
        return [
            self.count.tolist(),
            self.kept.tolist(),
            list(self.calls),
            self.record.calls,
            [(int(norm.num_batches_tracked), norm.running_mean.tolist()) for norm in norms],
        ]


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(Branch() for _ in range(3))

    def forward(self, x: Tensor, weight: float, notes: list[int]) -> Tensor:
        for branch in self.branches:
            y = branch(x, weight, notes)
            y = torch.tanh(y.view(y.shape[0], -1, 2)).flatten(1)
            x = x + y
        return x


def test_a_closed_branch_changes_nothing_on_new_shapes_new_numbers_or_in_a_copy() -> None:
    model, x = Trunk(), torch.randn(4, 6)
    sd.apply(model, sd.Uniform(0.5), example=(x, 1.0, []))
    notes: list[int] = []
    for each in (model, copy.deepcopy(model)):
        before = [branch.state() for branch in each.branches]
        state, torch_state = random.getstate(), torch.get_rng_state()
        with sd.handle_of(each).forced([False] * 3):
            for samples, weight in ((4, 1.0), (7, 1.0), (7, 0.5), (8, 0.25)):
                x = torch.ones(samples, 6)
                assert torch.equal(each(x, weight, notes), x)
        assert [branch.state() for branch in each.branches] == before
        assert not notes
        assert random.getstate() == state
        assert torch.equal(torch.get_rng_state(), torch_state)


def test_copies_in_several_threads_run_no_closed_branch() -> None:
    model = Trunk()
    sd.apply(model, sd.Uniform(0.5), example=(torch.randn(4, 6), 1.0, []))
    copies = [copy.deepcopy(model) for _ in range(4)]
    wrong: list[object] = []

    def run(each: Trunk, first: int) -> None:
        ran: list[Tensor] = []
        for branch in each.branches:
            branch.linear.register_forward_hook(lambda module, args, output: ran.append(output))
        try:
            with sd.handle_of(each).forced([False] * 3):
                for samples in range(first, first + 25):
                    x = torch.randn(samples, 6)
                    if not torch.equal(each(x, 1.0, []), x) or ran:
                        wrong.append(samples)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(c, 2 + 30 * n)) for n, c in enumerate(copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@dataclass
class Result:
    """What a branch gives; PyTorch does not look into it."""

    name: str
    y: Tensor
    others: list[Tensor]


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Result:
        y = self.linear(x)
        return Result("linear", y, [y.relu(), y])


class GivesObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(Wraps() for _ in range(3))
        self.results: list[Result] = []

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        self.results = []
        for n, branch in enumerate(self.branches):
            result = branch(x)
            self.results.append(result)
            branch_value = result.y.tanh() + result.others[0]
            x = x + branch_value if gates is None else x + gates[n] * branch_value
        return x


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
def test_a_branch_may_give_its_result_in_an_object(gate) -> None:
    x = torch.randn(5, 6)
    model = GivesObjects()
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=x, gate=gate)
    for step in range(8):
        handle.step = step
        out = model(x)
        gates = handle.gates.float()
        torch.testing.assert_close(out, plain(x, gates if gates.ndim == 1 else gates[:, :, None]))


def test_an_object_of_a_closed_branch_holds_what_the_branch_would_give() -> None:
    x = torch.randn(5, 6)
    model = GivesObjects()
    handle = sd.apply(model, sd.Uniform(0.5), example=x)
    for gates in itertools.product([True, False], repeat=3):
        with handle.forced(gates):
            model(x)
        for result in model.results:
            assert (result.name, result.y.shape) == ("linear", x.shape)
            assert torch.equal(result.others[0], result.y.relu())
        if not any(gates):
            assert torch.equal(result.y, model.branches[-1].linear(x))


class Bias:
    """Holds a tensor, as the attention biases of some libraries do."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        alive.add(self)


alive: weakref.WeakSet[Bias] = weakref.WeakSet()


class Cuts(nn.Module):
    """The length of its output depends on an attribute, and on values of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.keep, self.gives_pair = nn.Linear(6, 6), 5, False

    def forward(self, x: Tensor, bias: Bias, lengths: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.linear(x)[:, : min(self.keep, *lengths.tolist())] + bias.tensor
        return (y, 2 * y) if self.gives_pair else y


class CutsInLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(Cuts() for _ in range(2))
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        self.seen = []
        for branch in self.branches:
            made = branch(x, Bias(torch.zeros(6)), lengths)
            y, *others = made if isinstance(made, tuple) else (made,)
            self.seen.append((y.shape[1], len(others)))
            x = x + nn.functional.pad(y, (0, 0, 0, x.shape[1] - y.shape[1]))
        return x


@pytest.fixture
def cutting() -> tuple[CutsInLoop, sd.Handle]:
    model = CutsInLoop()
    return model, sd.apply(model, example=(torch.randn(2, 5, 6), torch.tensor([5, 5])))


def test_shapes_follow_the_attributes_of_modules_and_the_values_that_these_read(cutting) -> None:
    model, handle = cutting
    for keep, lengths, pair in ((5, [5, 5], 0), (3, [5, 5], 0), (5, [4, 2], 1), (5, [5, 5], 0)):
        for branch in model.branches:
            branch.keep, branch.gives_pair = keep, bool(pair)
        x = torch.randn(2, 5, 6)
        with handle.forced([False, False]):
            assert torch.equal(model(x, torch.tensor(lengths)), x)
        assert model.seen == [(min(keep, *lengths), pair)] * 2


class Options:
    def __init__(self) -> None:
        self.gives_weights = False


class Optional(nn.Module):
    """Gives its weights too if its options say so, and as many parts as its input is long."""

    def __init__(self, options: Options | None) -> None:
        super().__init__()
        self.linear, self.options = nn.Linear(6, 6), options

    def forward(self, x: Tensor, options: Options | None) -> tuple[Tensor, ...]:
        h = self.linear(x)
        asked = options or self.options
        assert asked is not None
        weights = (h.softmax(-1),) if asked.gives_weights else ()
        return (*h.unbind(1), *weights)


class OptionsInLoop(nn.Module):
    def __init__(self, holds: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options, self.holds = Options(), holds
        self.layers = nn.ModuleList(Optional(self.options if holds else None) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        weights: tuple[Tensor, ...] = ()
        for layer in self.layers:
            parts = layer(x, None if self.holds else self.options)
            x = x + torch.stack(parts[: x.shape[1]], 1)
            weights += parts[x.shape[1] :]
        return x, *weights


@pytest.mark.parametrize("holds", [True, False])
def test_the_results_of_a_branch_are_as_many_as_its_options_and_its_inputs_say(holds) -> None:
    model = OptionsInLoop(holds)
    handle = sd.apply(model, example=torch.randn(3, 4, 6))
    assert {found.mechanism for found in applied_to(model).found} == {"deferred"}
    for length, gives_weights in ((4, False), (6, False), (2, True), (1, False), (4, True)):
        model.options.gives_weights = gives_weights
        x = torch.randn(3, length, 6)
        with handle.forced([False, False]):
            out, *weights = model(x)
        assert torch.equal(out, x)
        assert [each.shape for each in weights] == [x.shape] * (2 * gives_weights)


def test_shapes_that_are_kept_hold_no_object_of_the_model_and_are_inferred_once(
    cutting, monkeypatch
) -> None:
    model, handle = cutting
    counts, inferred = [], []
    infer = shapes._infer
    monkeypatch.setattr(shapes, "_infer", lambda node: inferred.append(0) or infer(node))
    for _ in range(4):
        with handle.forced([False, False]):
            model(torch.randn(2, 5, 6), torch.tensor([5, 3]))
        counts.append(len(inferred))
    assert counts == counts[:1] * 4
    gc.collect()
    assert not alive


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, biases: list[Bias]) -> Tensor:
        return self.linear(x) * biases[0].tensor


class TakesObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(Biased() for _ in range(3))

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        for n, branch in enumerate(self.branches):
            y = branch(x, [Bias(x.sigmoid())])
            x = x + y if gates is None else x + gates[n] * y
        return x


@pytest.mark.parametrize("gate", ["batch", "sample", "subset"])
def test_a_branch_may_take_its_inputs_in_an_object(gate) -> None:
    x = torch.randn(5, 6)
    model = TakesObjects()
    plain = copy.deepcopy(model)
    handle = sd.apply(model, sd.Uniform(0.5), example=x, gate=gate)
    for _ in range(8):
        out = model(x)
        gates = handle.gates.float()
        torch.testing.assert_close(out, plain(x, gates if gates.ndim == 1 else gates[:, :, None]))
