import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special

from stochastic_depth.analysis.score import Score


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
