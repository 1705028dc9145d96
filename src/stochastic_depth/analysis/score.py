"""How good and how well calibrated predictions are, gathered batch by batch."""

import torch
from torch import Tensor

BINS = 15
"""Of confidence, of equal width (Guo et al. 2017, arXiv:1706.04599)."""


class Score:
    """Error, negative log-likelihood and expected calibration error of one predictor."""

    def __init__(self) -> None:
        self._images = 0
        self._wrong: Tensor | float = 0.0
        self._nll: Tensor | float = 0.0
        self._gaps: Tensor | float = 0.0

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """One batch.

        Args:
            log_probabilities: float64 [batch, classes], of each image summing to 1.
            labels: int64 [batch].
        """
        confidence, predicted = log_probabilities.max(1)
        confidence, right = confidence.exp(), predicted == labels
        edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype, device=labels.device)
        gaps = confidence.new_zeros(BINS)
        # Bins are (a, b], so that a confidence of 1 is in the last one.
        gaps.index_add_(
            0, torch.bucketize(confidence, edges[1:-1]), right.to(confidence) - confidence
        )
        self._images += len(labels)
        self._wrong = self._wrong + (~right).sum()
        self._nll = self._nll - log_probabilities.gather(1, labels[:, None]).sum()
        self._gaps = self._gaps + gaps

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * float(self._wrong) / self._images

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats."""
        return float(self._nll) / self._images

    @property
    def ece(self) -> float:
        """Distance of accuracy and confidence, mean over the bins by their images: 0..1."""
        return float(torch.as_tensor(self._gaps).abs().sum()) / self._images
