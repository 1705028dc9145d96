"""The Lightning callback: applied by the Trainer, resumed bit for bit, logged."""

import copy
import warnings

import pytest
import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")

from stochastic_depth.integrations.lightning import StochasticDepth  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:::lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Classifier(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.network = network
        self.gates = []

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.gates.append(sd.handle_of(self.network).gates.tolist())
        return loss

    def test_step(self, batch, number):
        self.log("mean", self.network(batch[0]).mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 3, 8, 8, generator=generator)
    labels = torch.randint(10, (48,), generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8)


def network():
    torch.manual_seed(0)
    return CifarResNet(20)


def trainer(callback, folder, **options):
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=[callback], **options,
    )  # fmt: skip


def test_a_run_stopped_and_resumed_is_one_that_was_never_stopped(loader, tmp_path):
    straight, first, second = (Classifier(network()) for _ in range(3))
    trainer(StochasticDepth(sd.Uniform(0.5)), tmp_path, max_epochs=4).fit(straight, loader)
    stopped = trainer(StochasticDepth(sd.Uniform(0.5)), tmp_path, max_epochs=2)
    stopped.fit(first, loader)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trainer(StochasticDepth(sd.Uniform(0.5)), tmp_path, max_epochs=4)
    resumed.fit(second, loader, ckpt_path=tmp_path / "half.ckpt")
    assert first.gates + second.gates == straight.gates
    assert len({tuple(gates) for gates in straight.gates}) > 12
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("per", "different"), [("step", 2), ("pass", 6)])
def test_gates_are_drawn_for_a_step_of_the_optimizer_or_for_each_pass(
    per, different, loader, tmp_path
):
    module = Classifier(network())
    callback = StochasticDepth(sd.Uniform(0.5), gates_per=per)
    trainer(callback, tmp_path, max_epochs=1, accumulate_grad_batches=3).fit(module, loader)
    handle = callback.handle
    expected = [handle.gates_at(n // 3 if per == "step" else n).tolist() for n in range(6)]
    assert module.gates == expected
    assert len({tuple(gates) for gates in module.gates}) == different


def stepped(make_optimizer, passes, callback, loader, folder):
    """The gates of all passes of a module that makes several in each training step."""

    class Passes(Classifier):
        def training_step(self, batch, number):
            return sum(super(Passes, self).training_step(batch, number) for _ in range(passes))

        def configure_optimizers(self):
            return make_optimizer(self.parameters())

    module = Passes(network())
    trainer(callback, folder, max_steps=3, max_epochs=1).fit(module, loader)
    return module


@pytest.mark.parametrize(
    ("make_optimizer", "passes"),
    [
        (lambda parameters: torch.optim.SGD(parameters, 0.1), 2),
        (lambda parameters: torch.optim.LBFGS(parameters, max_iter=3, lr=0.01), 1),
    ],
)
def test_all_passes_of_a_step_share_gates(make_optimizer, passes, loader, tmp_path):
    callback = StochasticDepth(sd.Uniform(0.5))
    module = stepped(make_optimizer, passes, callback, loader, tmp_path)
    each = len(module.gates) // 3
    assert each >= 2
    assert module.gates == [callback.handle.gates_at(n // each).tolist() for n in range(3 * each)]
    module.network.train()(torch.zeros(2, 3, 8, 8))
    assert callback.handle.step == 4  # a loop of one's own draws a next step again


def test_a_run_that_has_failed_leaves_the_gates_to_other_loops(loader, tmp_path):
    module, callback = Classifier(network()), StochasticDepth(sd.Uniform(0.5))
    module.optimizer_step = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer(callback, tmp_path, max_epochs=1).fit(module, loader)
    assert callback.handle.optimizer_steps is None


def test_weight_averaging_estimates_batchnorm_at_full_depth(loader, tmp_path):
    class Copied(Classifier):
        def on_train_batch_start(self, batch, number):
            if self.current_epoch == 3 and number == 0:  # the epoch after max_epochs
                self.averaged = copy.deepcopy(self.network)

        def on_train_epoch_end(self):
            self.estimated = copy.deepcopy(self.network.state_dict())

    module, callback = Copied(network()), StochasticDepth(sd.Uniform(0.5))
    averaging = pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
    run = trainer(callback, tmp_path, max_epochs=3)
    run.callbacks.append(averaging)
    run.fit(module, loader)
    with sd.handle_of(module.averaged).full_depth():
        torch.optim.swa_utils.update_bn(loader, module.averaged)
    expected = dict(module.averaged.named_buffers())
    assert any("running_mean" in name for name in expected)
    for name, buffer in expected.items():
        torch.testing.assert_close(module.estimated[name], buffer)
    assert callback.handle.step == 18
    module.network.train()(torch.zeros(2, 3, 8, 8))
    assert callback.handle.gates.tolist() == callback.handle.gates_at(18).tolist()


def test_each_step_logs_depths_and_drop_rate(loader, tmp_path):
    callback = StochasticDepth(sd.LinearDecay(0.5))
    ended = trainer(callback, tmp_path, max_epochs=1, log_every_n_steps=1)
    ended.fit(module := Classifier(network()), loader)
    logged = {name: float(value) for name, value in ended.callback_metrics.items()}
    assert logged["stochastic_depth/expected_depth"] == pytest.approx(
        sum(1 - n / 18 for n in range(1, 10))
    )
    assert logged["stochastic_depth/drop_rate"] == pytest.approx(1 - 6.5 / 9)
    assert logged["stochastic_depth/realised_depth"] == sum(module.gates[-1])


def test_a_checkpoint_of_other_probabilities_is_refused(loader, tmp_path):
    module = Classifier(network())
    ended = trainer(StochasticDepth(sd.Uniform(0.5)), tmp_path, max_epochs=1)
    ended.fit(module, loader)
    ended.save_checkpoint(tmp_path / "half.ckpt")
    other = trainer(StochasticDepth(sd.Uniform(0.8)), tmp_path, max_epochs=2)
    with pytest.raises(sd.errors.StateError, match=r"survival=\[0.5"):
        other.fit(Classifier(network()), loader, ckpt_path=tmp_path / "half.ckpt")


def test_it_is_applied_once_and_evaluates_the_scaled_network(loader, tmp_path):
    module = Classifier(network())
    callback = StochasticDepth(sd.Uniform(0.5))
    again = trainer(callback, tmp_path, max_epochs=1)
    again.fit(module, loader)
    handle = callback.handle
    (result,) = again.test(module, loader, verbose=False)
    assert callback.handle is handle
    sd.remove(module.network)
    images = torch.cat([x for x, _ in loader])
    plain = module.network.eval()(images).mean().item()
    assert abs(result["mean"] - plain) > 1e-4
    sd.apply(module.network, sd.Uniform(0.5))
    scaled = module.network.eval()(images).mean().item()
    assert result["mean"] == pytest.approx(scaled, rel=1e-3)


def test_what_the_module_has_applied_itself_is_taken_over(loader, tmp_path):
    module = Classifier(network())
    handle = sd.apply(module.network, sd.Uniform(0.7))
    callback = StochasticDepth()
    trainer(callback, tmp_path, max_epochs=1).fit(module, loader)
    assert callback.handle is handle
    with pytest.raises(sd.errors.ApplyError, match=r"has stochastic depth already: sd\.remove"):
        trainer(StochasticDepth(sd.Uniform(0.5)), tmp_path, max_epochs=1).fit(module, loader)


def test_a_foreign_network_takes_the_modules_example(loader, tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x + self.mix(x)

    blocks = nn.Sequential(*(Block() for _ in range(6)), nn.Flatten(), nn.LazyLinear(10))
    blocks(torch.zeros(2, 3, 8, 8))
    module = Classifier(blocks)
    module.example_input_array = torch.randn(2, 3, 8, 8)
    callback = StochasticDepth(sd.Uniform(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(callback, tmp_path, max_epochs=1).fit(module, loader)
    assert len(callback.handle.blocks) == 6


def test_a_module_of_two_networks_is_asked_which(loader, tmp_path):
    module = Classifier(network())
    module.other = network()
    with pytest.raises(sd.errors.ApplyError, match=r"2 children .*network, other.*network="):
        trainer(StochasticDepth(), tmp_path, max_epochs=1).fit(module, loader)
    callback = StochasticDepth(network="network")
    trainer(callback, tmp_path, max_epochs=1).fit(module, loader)
    assert callback.handle is sd.handle_of(module.network)
    sd.apply(module.other)
    with pytest.raises(sd.errors.ApplyError, match=r"several modules \('network', 'other'\)"):
        trainer(StochasticDepth(), tmp_path, max_epochs=1).fit(module, loader)
    callback = StochasticDepth(network="other")
    trainer(callback, tmp_path, max_epochs=1).fit(module, loader)
    assert callback.handle is sd.handle_of(module.other)
    with pytest.raises(sd.errors.ApplyError, match=r"network='D': .* children are network, other"):
        trainer(StochasticDepth(network="D"), tmp_path, max_epochs=1).fit(module, loader)


def test_each_of_two_networks_has_a_callback_and_resumes_its_gates(loader, tmp_path):
    class Two(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.G, self.D = network(), network()
            self.gates = []

        def training_step(self, batch, _):
            loss = self.G(batch[0]).square().mean() + self.D(batch[0]).square().mean()
            self.gates.append([sd.handle_of(net).gates.tolist() for net in (self.G, self.D)])
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    def fitted(steps, checkpoint=None):
        run = trainer(StochasticDepth(sd.Uniform(0.5), network="G"), tmp_path, max_steps=steps)
        run.callbacks.append(StochasticDepth(sd.Uniform(0.7), network="D", gates_per="pass"))
        run.fit(module := Two(), loader, ckpt_path=checkpoint)
        return run, module

    run, straight = fitted(4)
    assert run.callback_metrics["G/stochastic_depth/expected_depth"] == pytest.approx(4.5)
    assert run.callback_metrics["D/stochastic_depth/expected_depth"] == pytest.approx(6.3)
    run, _ = fitted(2)
    run.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fitted(4, tmp_path / "half.ckpt")
    assert resumed.gates == straight.gates[2:]


class BuiltLater(Classifier):
    """A module that makes its network in `configure_model`."""

    def __init__(self, applied):
        super().__init__(None)
        self.applied = applied

    def configure_model(self):
        if self.network is None:
            self.network = network()
            if self.applied:
                sd.apply(self.network, sd.Uniform(0.5))


@pytest.mark.parametrize("name", [None, "network"])
def test_a_network_built_in_configure_model_is_applied_to_there(name, loader, tmp_path):
    with pytest.raises(
        sd.errors.ApplyError, match=r"call sd\.apply\(network, \.\.\.\) at the end of"
    ):
        trainer(StochasticDepth(sd.Uniform(0.5), network=name), tmp_path, max_epochs=1).fit(
            BuiltLater(applied=False), loader
        )
    with pytest.raises(sd.errors.ApplyError, match="there is no handle yet"):
        trainer(StochasticDepth(network=name), tmp_path, max_epochs=1).fit(
            BuiltLater(applied=False), loader
        )
    straight, resumed = BuiltLater(applied=True), BuiltLater(applied=True)
    trainer(StochasticDepth(network=name), tmp_path, max_epochs=2).fit(straight, loader)
    first = trainer(StochasticDepth(network=name), tmp_path, max_epochs=1)
    first.fit(BuiltLater(applied=True), loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(callback := StochasticDepth(network=name), tmp_path, max_epochs=2)
    second.fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.gates == straight.gates[6:]
    assert callback.handle is sd.handle_of(resumed.network)
