"""Pruned networks, against plain networks that never had them."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import stochastic_depth as sd
from stochastic_depth.errors import ConfigError
from stochastic_depth.export.depths import parameters_of, without_blocks
from stochastic_depth.lab.options import PruningOptions
from stochastic_depth.lab.pruning import load_or_measure_curves, measure_curves, spread
from stochastic_depth.lab.recorded import load_trained
from stochastic_depth.tensors import copied
from stochastic_depth.train import best_record
from stochastic_depth.train.build import build_model
from stochastic_depth.train.step import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = PruningOptions(points=3, choose_on=50, recalibrate_on=100, batch=20, repeats=2)
KINDS = ("constant", "stochastic")


@pytest.fixture(params=KINDS)
def network(request, pairs):
    return load_trained(pairs[request.param][0].path)


class Around(nn.Module):
    """What is left of a block whose branch is gone."""

    def __init__(self, unit):
        super().__init__()
        self.shortcut = unit.shortcut

    def forward(self, x):
        return F.relu(x if self.shortcut is None else self.shortcut(x))


class Times(nn.Module):
    """A block whose branch counts p_l times."""

    def __init__(self, unit, p):
        super().__init__()
        self.branch, self.shortcut, self.p = unit.branch, unit.shortcut, p

    def forward(self, x):
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return F.relu(shortcut + self.p * self.branch(x))


def plain_without(network, removed):
    """A network of the same weights that knows nothing of stochastic depth."""
    run = network.run
    model = build_model(run.config.model, run.shape[0], len(run.classes), 0)
    model.load_state_dict(network.model.state_dict())
    model.blocks = nn.Sequential(
        *(
            Around(unit) if number in removed else Times(unit, p)
            for number, (unit, p) in enumerate(
                zip(model.blocks, network.handle.survival, strict=True)
            )
        )
    )
    return model.eval()


@pytest.fixture
def plain(network):
    """The network with p_l in its weights."""
    model = copied(network.model)
    sd.fold(model, next(iter(network.batches.evaluate("test")))[0][:4])
    return model


@pytest.mark.parametrize("removed", [(), (5,), (0, 2, 4), (0, 1, 2, 3, 4, 5)])
def test_a_network_without_blocks_is_the_plain_one_that_never_had_them(network, plain, removed):
    images, _ = next(iter(network.batches.evaluate("test")))
    pruned, expected = without_blocks(plain, removed), plain_without(network, removed)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), expected(images), rtol=1e-4, atol=1e-4)
    assert parameters_of(pruned) == parameters_of(expected)


@pytest.mark.parametrize("removed", [(), (2, 5)])
def test_recalibration_is_pytorchs_update_bn_and_leaves_the_network_alone(network, plain, removed):
    batches = [images for images, _ in itertools.islice(network.batches.train(0), 3)]
    before = copy.deepcopy(plain.state_dict())
    pruned, expected = without_blocks(plain, removed, batches), plain_without(network, removed)
    update_bn(batches, expected)
    images, _ = next(iter(network.batches.evaluate("test")))
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), expected.eval()(images), rtol=1e-3, atol=1e-3)
    assert not any(module.training for module in pruned.modules())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_networks_without_blocks_share_their_parameters(plain):
    parameters = {id(parameter) for parameter in plain.parameters()}
    assert {id(parameter) for parameter in without_blocks(plain, (0, 3)).parameters()} < parameters


def test_images_are_spread_evenly_over_batches_of_any_size():
    labels = torch.arange(23)
    batches = [(labels[i:j, None], labels[i:j]) for i, j in ((0, 4), (4, 5), (5, 23))]
    chosen = torch.cat([few for _, few in spread(batches, 23, 5)])
    assert chosen.tolist() == [0, 4, 9, 13, 18]
    assert torch.cat([x for x, _ in spread(batches, 23, 5)])[:, 0].equal(chosen)
    assert torch.cat([few for _, few in spread(batches, 23, 99)]).equal(labels)


def _places(point):
    """The places of removed blocks, from 0."""
    return tuple(number - 1 for number in point.blocks)


def test_the_curves_begin_at_the_journals_errors_and_end_without_a_block(network, silent):
    record = best_record(network.run.records())
    found = measure_curves(network, FEW, silent)
    assert [(curve.order, curve.recalibrated) for curve in found] == [
        (order, again) for order in ("last", "least needed") for again in (False, True)
    ]
    for curve in found:
        assert [point.removed for point in curve.points] == [0, 3, 6]
        assert [len(point.blocks) for point in curve.points] == [0, 3, 6]
        sizes = [point.parameters for point in curve.points]
        assert sizes == [parameters_of(plain_without(network, _places(p))) for p in curve.points]
        assert min(point.seconds_per_image for point in curve.points) > 0
    assert found[0].points[1].blocks == [4, 5, 6]
    for curve in (found[0], found[2]):
        first = curve.points[0]
        assert (first.error, first.validation_error) == pytest.approx(
            (record.test_error, record.validation_error)
        )
    for point in (found[0].points[1], found[2].points[1]):
        plain = plain_without(network, _places(point))
        expected = evaluate(plain, network.batches.evaluate("test"), network.run.runtime).error
        assert point.error == pytest.approx(expected, abs=0.21)
    assert found[0].points[2].error == found[2].points[2].error


def test_the_first_block_chosen_is_the_one_whose_loss_alone_is_lowest(network, silent):
    few = list(spread(network.batches.evaluate("validation"), 100, 50))
    losses = [
        evaluate(plain_without(network, [block]), few, network.run.runtime).loss
        for block in range(6)
    ]
    settings = PruningOptions(points=7, choose_on=50, recalibrate_on=100, batch=20, repeats=2)
    least = measure_curves(network, settings, silent)[2]
    assert losses[_places(least.points[1])[0]] == pytest.approx(min(losses), rel=1e-5)


def test_what_was_found_is_written_and_read_again(pairs, silent):
    network = load_trained(pairs["stochastic"][0].path)
    shown = []
    found = load_or_measure_curves(network, FEW, lambda *what: shown.append(what))
    content = json.loads((network.run.path / "analysis" / "pruning.json").read_text())
    assert (content["format"], content["blocks"], content["images"]) == (1, 6, 500)
    assert content["checkpoint_step"] == network.step
    assert set(content["curves"][0]["points"][0]) == {
        *("removed", "blocks", "error", "validation_error", "parameters", "seconds_per_image")
    }
    stages = list(dict.fromkeys(doing for doing, _, _ in shown))
    assert stages == ["choosing", "recalibrating", "test error", "validation error", "timing"]
    assert sum(doing == "choosing" for doing, _, _ in shown) == 6 * 7 / 2
    assert all(0 <= done <= total for _, done, total in shown)
    shown.clear()
    assert load_or_measure_curves(network, FEW, lambda *what: shown.append(what)) == found
    assert not shown


@pytest.mark.parametrize("setting", ["points", "choose_on", "recalibrate_on", "batch", "repeats"])
def test_settings_out_of_range_are_named(setting):
    with pytest.raises(
        ConfigError, match=f"--{setting.replace('_', '-')} is 0: it must be at least"
    ):
        PruningOptions(**{setting: 0}).check()
