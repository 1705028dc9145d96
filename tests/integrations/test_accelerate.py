"""Gates that follow the optimizer under accelerate, in its loops and its saved states."""

import copy
import io
import json

import pytest
import torch

import stochastic_depth as sd
from stochastic_depth.integrations import _on_device_of, metrics
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


def test_each_of_two_models_follows_its_own_optimizer_and_has_its_own_state(tmp_path):
    def prepared():
        accelerator = accelerate.Accelerator(cpu=True)
        pairs = []
        for seed in (1, 2):
            model = CifarResNet(8)
            sd.apply(model, seed=seed)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            pairs.append(accelerator.prepare(model, optimizer))
        return accelerator, [(*pair, follow(accelerator, *pair)) for pair in pairs]

    accelerator, pairs = prepared()
    for (model, optimizer, _), steps in zip(pairs, (1, 2), strict=True):
        for _ in range(steps):
            accelerator.backward(model(IMAGES[0]).sum())
            optimizer.step()
    accelerator.save_state(str(tmp_path))
    accelerator, pairs = prepared()
    accelerator.load_state(str(tmp_path))
    assert [(handle.seed, handle.step) for _, _, handle in pairs] == [(1, 1), (2, 2)]


def test_a_second_follow_replaces_the_first_and_goes_on_from_the_step_of_the_gates(tmp_path):
    loop = Loop(accumulate=1)
    loop.train(0, 3)
    first = loop.optimizer
    second = torch.optim.AdamW(loop.model.parameters(), lr=0.01)
    loop.optimizer = loop.accelerator.prepare(second)
    follow(loop.accelerator, loop.model, loop.optimizer)
    loop.train(3, 6)
    first.step()  # counts no longer
    loop.train(6, 8)
    assert loop.gates == [loop.handle.gates_at(n).tolist() for n in range(8)]
    loop.accelerator.save_state(str(tmp_path))
    assert json.loads((tmp_path / FILE).read_text())["step"] == 8
    loop.handle.step = 100
    follow(loop.accelerator, loop.model, loop.optimizer)
    loop.train(8, 10)
    assert loop.gates[8:] == [loop.handle.gates_at(n).tolist() for n in (100, 101)]
    loop.accelerator.load_state(str(tmp_path))
    loop.train(8, 9)
    assert loop.gates[-1] == loop.handle.gates_at(8).tolist()


def pickled(model):
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, pickled, lambda model: torch.optim.swa_utils.AveragedModel(model).module],
)
def test_a_copy_of_a_followed_model_has_gates_of_its_own(copy_of):
    loop = Loop(accumulate=1)
    loop.train(0, 3)
    copied = copy_of(loop.model).train()
    handle = sd.handle_of(copied)
    gates = []
    for step in (None, None, 50, None):
        if step is not None:
            handle.step = step
        copied(IMAGES[0])
        gates.append(handle.gates.tolist())
    assert gates == [loop.handle.gates_at(n).tolist() for n in (3, 4, 50, 51)]
    loop.train(3, 5)
    assert loop.gates[3:] == [loop.handle.gates_at(n).tolist() for n in (3, 4)]


def test_a_model_that_the_accelerator_has_let_go_of_keeps_no_file(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared():
        model = CifarResNet(8)
        sd.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return [*(pair := accelerator.prepare(model, optimizer)), follow(accelerator, *pair)]

    prepared()  # as find_executable_batch_size does, when memory has run out
    accelerator.free_memory()
    model, optimizer, _ = prepared()
    for _ in range(3):
        accelerator.backward(model(IMAGES[0]).sum())
        optimizer.step()
    accelerator.save_state(str(tmp_path))
    assert [file.name for file in tmp_path.glob("*.json")] == [FILE]
    accelerator.free_memory()
    *_, handle = prepared()
    accelerator.load_state(str(tmp_path))
    assert handle.step == 3


def test_a_model_that_is_not_prepared_is_refused():
    accelerator, model = accelerate.Accelerator(cpu=True), CifarResNet(8)
    sd.apply(model)
    with pytest.raises(sd.errors.ApplyError, match="CifarResNet was not prepared by this"):
        follow(accelerator, model, torch.optim.SGD(model.parameters()))


def test_of_several_applied_modules_in_a_model_each_is_followed_by_itself():
    accelerator = accelerate.Accelerator(cpu=True)
    model = torch.nn.ModuleDict({"encoder": CifarResNet(8), "decoder": CifarResNet(8)})
    handles = [sd.apply(part) for part in model.values()]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(sd.errors.ApplyError, match=r"\('encoder', 'decoder'\): call follow for"):
        follow(accelerator, model, optimizer)
    assert [follow(accelerator, part, optimizer) for part in model.values()] == handles


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
    (tmp_path / FILE).write_text('{"step": 2')
    with pytest.raises(sd.errors.CheckpointError, match=f"{FILE} is damaged"):
        Loop().accelerator.load_state(str(tmp_path))
    (tmp_path / FILE).unlink()
    with pytest.raises(sd.errors.CheckpointError, match=f"{FILE} is missing"):
        Loop().accelerator.load_state(str(tmp_path))


def test_one_process_writes_the_file_and_what_was_there_outlives_a_failure(tmp_path, monkeypatch):
    loop = Loop()
    loop.train(0, 2)
    loop.accelerator.save_state(str(tmp_path))
    before = (tmp_path / FILE).read_bytes()
    loop.train(2, 4)

    def full(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", full)
        with pytest.raises(sd.errors.RunError, match=f"{FILE} could not be written"):
            loop.accelerator.save_state(str(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before
    monkeypatch.setattr(accelerate.Accelerator, "is_main_process", False)
    loop.accelerator.save_state(str(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before


def test_an_example_is_moved_to_the_device_of_the_model_whatever_holds_its_tensors():
    example = {"pixels": [IMAGES[0], (IMAGES[1],)], "scale": 2}
    moved = _on_device_of(torch.nn.Linear(2, 2, device="meta"), example)
    assert {moved["pixels"][0].device.type, moved["pixels"][1][0].device.type} == {"meta"}
    assert moved["scale"] == 2
    assert example["pixels"][0].device.type == "cpu"


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
    handle.load_state_dict(handle.state_dict())
    assert metrics(handle) == before


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


@pytest.mark.parametrize(
    "make",
    [lambda: CifarResNet(20), lambda: torch.nn.Sequential(*(Block() for _ in range(9)))],
    ids=["residual units", "other blocks"],
)
def test_a_model_with_hooks_on_every_module_is_skipped_and_loses_no_hook(make):
    torch.manual_seed(0)
    original = make().eval()
    model = copy.deepcopy(original)
    called = []

    class Notes(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(names[module])
            return args, kwargs

    names = {module: name for name, module in model.named_modules() if name}
    for module in names:  # as `device_map` and `cpu_offload` do
        accelerate.hooks.add_hook_to_module(module, Notes())
    model.eval()(IMAGES[0])
    before = called.copy()
    handle = sd.apply(model, sd.Uniform(0.5), scale="training", example=IMAGES[0])
    called.clear()
    torch.testing.assert_close(model.eval()(IMAGES[0]), original(IMAGES[0]))
    assert called == before
    called.clear()
    with handle.forced([False] * 9):
        model(IMAGES[0])
    branches = {f"{block.name}.{part}" for block in handle.blocks for part in ("branch", "conv")}
    assert not branches & set(called)
    assert set(called) < set(before)
    assert {block.name for block in handle.blocks} <= set(called)
