import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special

import stochastic_depth as sd
from stochastic_depth.draw import draw
from stochastic_depth.errors import ConfigError
from stochastic_depth.lab.ensemble import (
    Score,
    draw_subnetwork,
    load_or_measure_ensemble,
    measure_ensemble,
    sizes_up_to,
)
from stochastic_depth.lab.recorded import load_trained
from stochastic_depth.train import SurvivalConfig, best_record


def by_numpy(logits, labels, bins=15):
    """Error, NLL and ECE written out, with bins (a, b]."""
    probabilities = special.softmax(logits, axis=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    ece = 0.0
    for number in range(bins):
        members = place == number
        if members.any():
            gap = abs(right[members].mean() - confidence[members].mean())
            ece += members.mean() * gap
    nll = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    return 100 * (1 - right.mean()), nll, ece


@pytest.mark.parametrize("sharpness", [0.1, 1, 5, 60])
def test_the_figures_are_those_written_out_over_uneven_batches(sharpness):
    rng = np.random.default_rng(0)
    logits, labels = sharpness * rng.normal(size=(1000, 10)), rng.integers(10, size=1000)
    logits[np.arange(500), labels[:500]] += 2 * sharpness
    score = Score()
    for start, end in ((0, 1), (1, 640), (640, 1000)):
        log_p = F.log_softmax(torch.from_numpy(logits[start:end]), 1)
        score.add(log_p, torch.from_numpy(labels[start:end]))
    assert (score.error, score.nll, score.ece) == pytest.approx(by_numpy(logits, labels), rel=1e-9)


def test_certainty_counts_in_the_last_bin():
    log_p = torch.tensor([[0.0, -800.0], [0.0, -800.0]], dtype=torch.float64)
    score = Score()
    score.add(log_p, torch.tensor([0, 1]))
    assert (score.error, score.nll, score.ece) == (50.0, 400.0, 0.5)


def test_one_who_is_as_sure_as_right_is_calibrated():
    log_p = torch.tensor([[0.75, 0.25]] * 4, dtype=torch.float64).log()
    score = Score()
    score.add(log_p, torch.tensor([0, 0, 1, 0]))
    assert score.ece == pytest.approx(0, abs=1e-12)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def network(pairs):
    return load_trained(pairs["stochastic"][0].path)


def logits_by_hand(network, gates):
    """Every branch is run; that of a closed block is multiplied by zero."""
    model = copy.deepcopy(network.model)
    outs, labels = [], []
    with torch.no_grad():
        for images, of_images in network.batches.evaluate("test"):
            h = model.stem(images)
            for unit, b in zip(model.blocks, gates.tolist(), strict=True):
                shortcut = h if unit.shortcut is None else unit.shortcut(h)
                h = (shortcut + b * unit.branch(h)).relu()
            outs.append(model.head(h.mean((2, 3))))
            labels.append(of_images)
    return torch.cat(outs).double().numpy(), torch.cat(labels).numpy()


def test_every_predictor_is_the_one_written_out(network, silent):
    members = [draw_subnetwork(7, member, network.handle.survival) for member in range(5)]
    by_hand = [logits_by_hand(network, gates) for gates in members]
    labels = by_hand[0][1]
    probabilities = np.stack([np.exp(x - np.logaddexp.reduce(x, 1)[:, None]) for x, _ in by_hand])
    found = {(p.name, p.members): p for p in measure_ensemble(network, 5, 7, silent)}
    assert list(found) == [
        ("scaled", 1),
        ("single", 1),
        *(("mean", m) for m in (1, 2, 4, 5)),
        ("unscaled", 1),
    ]
    single = np.array([by_numpy(x, labels) for x, _ in by_hand])
    for name in ("single", "mean"):
        p = found[name, 1]
        assert (p.error, p.nll, p.ece) == pytest.approx(tuple(single.mean(0)), rel=1e-4)
        deviations = (p.error_deviation, p.nll_deviation, p.ece_deviation)
        assert deviations == pytest.approx(tuple(single.std(0, ddof=1)), rel=1e-3)
    for size in (2, 4, 5):
        groups = [probabilities[i : i + size] for i in range(0, 5 - size + 1, size)]
        figures = np.array([by_numpy(np.log(group.mean(0)), labels) for group in groups])
        p = found["mean", size]
        assert (p.error, p.nll, p.ece) == pytest.approx(tuple(figures.mean(0)), rel=1e-4)
        assert (p.error_deviation is None) == (len(groups) == 1)
    every = logits_by_hand(network, torch.ones(6, dtype=torch.bool))[0]
    p = found["unscaled", 1]
    assert (p.error, p.nll, p.ece) == pytest.approx(by_numpy(every, labels), rel=1e-4)


def test_the_scaled_network_has_the_figures_of_the_journal(network, silent):
    record = best_record(network.run.records())
    scaled = measure_ensemble(network, 1, 0, silent)[0]
    assert network.step == record.step
    assert (scaled.error, scaled.nll) == pytest.approx((record.test_error, record.test_loss))


def test_members_are_drawn_by_p_and_are_not_those_of_training():
    survival = (0.9, 0.3, 1.0)
    coins = torch.stack([draw_subnetwork(1, member, survival) for member in range(4000)])
    assert coins.double().mean(0).tolist() == pytest.approx(survival, abs=0.03)
    trained_with = torch.stack([draw(1, step, survival) for step in range(4000)])
    # Independent coins agree as often as two of the same probability do.
    agreement = (coins == trained_with).double().mean(0)
    assert agreement.tolist() == pytest.approx([p**2 + (1 - p) ** 2 for p in survival], abs=0.03)
    assert not torch.equal(
        coins[:100], torch.stack([draw_subnetwork(2, m, survival) for m in range(100)])
    )


def test_the_network_is_left_as_it_was(network, silent):
    images, _ = next(iter(network.batches.evaluate("test")))
    before = network.model(images).detach()
    measure_ensemble(network, 2, 0, silent)
    after = network.model(images)
    assert torch.equal(after, before)
    after.sum().backward()


def test_powers_of_two_and_the_number_asked_for_are_told():
    assert sizes_up_to(64) == [1, 2, 4, 8, 16, 32, 64]
    assert sizes_up_to(6) == [1, 2, 4, 6]
    assert sizes_up_to(1) == [1]


def test_what_was_found_is_written_and_read_again(network, silent):
    found = load_or_measure_ensemble(network, 2, 0, silent)
    content = json.loads((network.run.path / "analysis" / "ensemble.json").read_text())
    assert (content["format"], content["images"], content["subnetworks"]) == (1, 500, 2)
    assert [p["name"] for p in content["predictors"]] == [p.name for p in found]
    asked = []
    again = load_or_measure_ensemble(network, 2, 0, lambda *shown: asked.append(shown))
    assert again == found
    assert not asked
    load_or_measure_ensemble(network, 2, 0, lambda *shown: asked.append(shown), again=True)
    assert len(asked) == 4
    assert asked[-1] == ("predicting", 2000, 2000)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', "an edited number", "no checksum"])
def test_a_file_that_was_not_written_so_is_measured_again(network, silent, damage):
    found = load_or_measure_ensemble(network, 2, 0, silent)
    path = network.run.path / "analysis" / "ensemble.json"
    good = path.read_text()
    content = json.loads(good)
    if damage == "an edited number":
        content["predictors"][0]["error"] += 1
    if damage == "no checksum":
        del content["sha256"]
    path.write_text(damage if damage[0] in "{[" else json.dumps(content))
    assert load_or_measure_ensemble(network, 2, 0, silent) == found
    assert path.read_text() == good


def test_constant_depth_is_no_ensemble(pairs, silent):
    with pytest.raises(ConfigError, match="has constant depth"):
        measure_ensemble(load_trained(pairs["constant"][0].path), 2, 0, silent)


def test_a_network_whose_closed_blocks_run_forward_is_no_ensemble(network, silent):
    config = replace(network.run.config, survival=SurvivalConfig(closed="forward-only"))
    forward_only = replace(network, run=replace(network.run, config=config))
    with pytest.raises(ConfigError, match="every training step ran the whole network"):
        measure_ensemble(forward_only, 2, 0, silent)


def test_a_schedule_that_has_ended_leaves_no_ensemble(network, silent):
    sd.remove(network.model)
    handle = sd.apply(network.model, sd.LinearDecay(0.5), schedule=lambda step: 0.0)
    with pytest.raises(ConfigError, match=r"at step \d+: its schedule skips no block there"):
        measure_ensemble(replace(network, handle=handle), 2, 0, silent)
