import copy
from collections import Counter, OrderedDict, defaultdict, deque

import torch
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.surgery.model_state import preserve_state, seed_everything


class Statistics:
    """An object of the model's author."""

    def __init__(self) -> None:
        self.calls, self.sizes, self.mean = 0, list[int](), torch.zeros(2)

    def __repr__(self) -> str:
        return f"{vars(self)}"


class Recorder(nn.Module):
    """Counts its calls in containers of every kind, nested ones too, and in tensors inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.loads, self.recent, self.by_size = Counter(), deque(maxlen=3), defaultdict(list)
        self.order, self.nested, self.seen = OrderedDict(), {"of": ([0], [[1]])}, set[int]()
        self.averages, self.pair = [torch.zeros(2)], (torch.zeros(2), "name")
        self.statistics = {"all": Statistics()}
        self.itself = [self.nested]
        self.itself.append(self.itself)

    def forward(self, x: Tensor) -> Tensor:
        self.loads["all"] += 1
        self.recent.append(len(x))
        self.by_size[len(x)].append(x)
        self.order[len(self.order)] = 1
        self.nested["of"][1][0].append(2)
        self.seen.add(len(x))
        self.averages[0] += 1
        self.averages.append(x)
        self.pair[0].add_(1)
        statistics = self.statistics["all"]
        statistics.calls += 1
        statistics.sizes.append(len(x))
        statistics.mean.add_(1)
        statistics.last = x
        return x

    def state(self) -> object:
        names = (
            "statistics",
            "loads",
            "recent",
            "by_size",
            "order",
            "nested",
            "seen",
            "averages",
            "pair",
        )
        return copy.deepcopy([getattr(self, name) for name in names])


def test_containers_and_the_tensors_in_them_are_restored() -> None:
    model = Recorder()
    model(torch.ones(2))
    before, containers = model.state(), [model.loads, model.recent, model.nested["of"][1]]
    with preserve_state(model):
        for size in (2, 3, 4):
            model(torch.ones(size))
        assert str(model.state()) != str(before)
    assert str(model.state()) == str(before)
    after = [model.loads, model.recent, model.nested["of"][1]]
    assert all(new is old for new, old in zip(after, containers, strict=True))
    assert model.recent.maxlen == 3


def test_a_seed_that_waits_for_an_accelerator_stays() -> None:
    torch.manual_seed(42)
    tracker = torch.cuda._lazy_seed_tracker
    queued = tracker.manual_seed_all_cb
    model = nn.Sequential(sd.Residual(nn.Linear(4, 4)))
    sd.plan(model, torch.randn(2, 4))
    assert tracker.manual_seed_all_cb is queued


def test_an_accelerator_in_use_is_seeded_and_draws_afterwards_as_before(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(42)
    monkeypatch.setattr(torch.xpu, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.xpu, "default_generators", (generator,))
    with preserve_state(nn.Linear(2, 2)):
        seed_everything(7)
        assert generator.initial_seed() == 7
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(42).get_state())
