"""Gates that follow the optimizer under accelerate, in its loops and its saved states."""

import json

import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.integrations import metrics
from stochastic_depth.models import CifarResNet

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")

from stochastic_depth.integrations.accelerate import FILE, follow  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:::accelerate|torch"),
]
IMAGES = torch.randn(16, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


class Loop:
    def __init__(self, accumulate=2, p=0.5):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        torch.manual_seed(0)
        model = CifarResNet(20)
        self.handle = sd.apply(model, sd.Uniform(p))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        assert follow(self.accelerator, self.model, self.optimizer) is self.handle
        self.gates = []

    def train(self, first, last):
        for images in IMAGES[first:last]:
            with self.accelerator.accumulate(self.model):
                loss = torch.nn.functional.cross_entropy(self.model(images), LABELS)
                self.gates.append(self.handle.gates.tolist())
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()


def test_micro_batches_of_a_step_share_gates_and_a_resumed_run_is_the_same(tmp_path):
    straight = Loop()
    straight.train(0, 8)
    straight.accelerator.save_state(str(tmp_path))
    straight.train(8, 16)
    assert straight.gates == [straight.handle.gates_at(n // 2).tolist() for n in range(16)]
    resumed = Loop()
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(8, 16)
    assert resumed.gates == straight.gates[8:]
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_in_between_changes_nothing():
    alone, evaluated = Loop(), Loop()
    alone.train(0, 4)
    for n in range(4):
        evaluated.train(n, n + 1)
        evaluated.model.eval()(IMAGES[0])
        evaluated.model.train()
    assert alone.gates == evaluated.gates


def test_the_saved_state_is_json_and_another_one_is_refused(tmp_path):
    loop = Loop()
    loop.train(0, 4)
    loop.accelerator.save_state(str(tmp_path))
    assert json.loads((tmp_path / FILE).read_text())["step"] == 2
    with pytest.raises(sd.errors.StateError, match=r"survival=\[0.5"):
        Loop(p=0.8).accelerator.load_state(str(tmp_path))
    (tmp_path / FILE).unlink()
    with pytest.raises(sd.errors.CheckpointError, match=f"{FILE} is missing"):
        Loop().accelerator.load_state(str(tmp_path))


def test_a_model_without_stochastic_depth_is_refused():
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(sd.errors.ApplyError, match=r"before accelerator\.prepare"):
        follow(accelerator, model, torch.optim.SGD(model.parameters()))


def test_the_figures_of_a_pass():
    model = CifarResNet(20)
    handle = sd.apply(model, sd.Uniform(0.5), gate="sample")
    before = metrics(handle)
    assert before == {"stochastic_depth/expected_depth": 4.5, "stochastic_depth/drop_rate": 0.5}
    model(IMAGES[0])
    assert metrics(handle) == {
        **before, "stochastic_depth/realised_depth": handle.gates.sum().item() / 4
    }  # fmt: skip
