"""The implicit ensemble: is the network scaled by p_l as good as the mean of its subnetworks?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from stochastic_depth.errors import ConfigError
from stochastic_depth.export.depths import Progress
from stochastic_depth.lab.analyses import load_or_measure
from stochastic_depth.lab.formatting import plus_minus
from stochastic_depth.lab.outcomes import Spread
from stochastic_depth.lab.recorded import TrainedNetwork
from stochastic_depth.randomness import uniforms
from stochastic_depth.train import Run

BINS = 15
"""Bins of confidence, of equal width (Guo et al. 2017, arXiv:1706.04599)."""


class Score:
    """Error, negative log-likelihood and expected calibration error of one predictor."""

    def __init__(self) -> None:
        self._images = 0
        self._wrong: Tensor | float = 0.0
        self._nll: Tensor | float = 0.0
        self._gaps: Tensor | float = 0.0

    def add(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            log_probabilities: float64 [batch, classes]; the probabilities of each image sum to 1.
            labels: int64 [batch].
        """
        confidence, predicted = log_probabilities.max(1)
        confidence, right = confidence.exp(), predicted == labels
        edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype, device=labels.device)
        gaps = confidence.new_zeros(BINS)
        # Bins are (a, b], so a confidence of 1 is in the last one.
        gaps.index_add_(
            0, torch.bucketize(confidence, edges[1:-1]), right.to(confidence) - confidence
        )
        self._images += len(labels)
        self._wrong = self._wrong + (~right).sum()
        self._nll = self._nll - log_probabilities.gather(1, labels[:, None]).sum()
        self._gaps = self._gaps + gaps

    @property
    def error(self) -> float:
        """The error in percent."""
        return 100 * float(self._wrong) / self._images

    @property
    def nll(self) -> float:
        """The mean negative log-likelihood in nats."""
        return float(self._nll) / self._images

    @property
    def ece(self) -> float:
        """The distance of accuracy and confidence, averaged over the bins by their images: 0..1."""
        return float(torch.as_tensor(self._gaps).abs().sum()) / self._images


@dataclass(frozen=True)
class Predictor:
    """One predictor, measured on the test images."""

    name: Literal["scaled", "single", "mean", "unscaled"]
    """"scaled" is the full network times p_l. "single" is one subnetwork, drawn as in training.
    "mean" averages the probabilities of several subnetworks. "unscaled" is the full network without
    p_l, each branch as in a training step.

    The values of "single" are means over the drawn subnetworks, those of "mean" over disjoint
    groups of `members` subnetworks."""
    members: int
    """How many networks predict together."""
    error: float
    """Percent."""
    error_deviation: float | None
    """The deviation over subnetworks ("single") or groups of them ("mean"); None if there is only
    one."""
    nll: float
    """Mean negative log-likelihood, nats."""
    nll_deviation: float | None
    ece: float
    """Expected calibration error in 15 bins of equal width, 0..1."""
    ece_deviation: float | None


def load_or_measure_ensemble(
    network: TrainedNetwork,
    subnetworks: int,
    seed: int,
    progress: Progress,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[Predictor]:
    """The result of `measure_ensemble`, read from `analysis/ensemble.json` or written there.

    Args:
        again, say: as for `load_or_measure`.
    """
    settings = {
        "checkpoint_step": network.step,
        "images": network.batches.sizes["test"],
        "seed": seed,
        "subnetworks": subnetworks,
    }

    def measure() -> dict[str, Any]:
        predictors = measure_ensemble(network, subnetworks, seed, progress)
        return {"predictors": [asdict(predictor) for predictor in predictors]}

    found = load_or_measure(network.run, "ensemble", settings, measure, again, say)
    return [Predictor(**predictor) for predictor in found["predictors"]]


@torch.inference_mode()
def measure_ensemble(
    network: TrainedNetwork, subnetworks: int, seed: int, progress: Progress
) -> list[Predictor]:
    """Evaluate every predictor on every test image; each image is read once.

    Args:
        subnetworks: how many are drawn; "mean" is measured for 1, 2, 4, ... of them.
        seed: which subnetworks are drawn, as a function of (seed, member) and of p_l in the
            checkpoint.

    Raises:
        ConfigError: as `require_ensemble`, or when the schedule skips no block at the checkpoint.
    """
    handle, runtime = network.handle, network.run.runtime
    require_ensemble(network.run)
    if min(handle.survival) == 1:
        raise ConfigError(
            f"{network.run.path} is no ensemble at step {network.step}: its schedule skips no "
            "block there, so that every subnetwork is the whole network; give runs whose blocks "
            "are skipped to the end"
        )
    members = [draw_subnetwork(seed, member, handle.survival) for member in range(subnetworks)]
    scaled, unscaled = Score(), Score()
    groups = {
        size: [Score() for _ in range(subnetworks // size)] for size in sizes_up_to(subnetworks)
    }
    total = network.batches.sizes["test"] * (subnetworks + 2)
    done = 0

    def predict(images: Tensor) -> Tensor:
        nonlocal done
        done += len(images)
        progress("predicting", done, total)
        with runtime.autocast():
            return F.log_softmax(network.model(images).double(), 1)

    for images, labels in network.batches.evaluate("test"):
        scaled.add(predict(images), labels)
        with handle.subnetwork([True] * len(handle.blocks)):
            unscaled.add(predict(images), labels)
        together: dict[int, Tensor] = {}
        for number, gates in enumerate(members, start=1):
            with handle.subnetwork(gates):
                alone = predict(images)
            for size, scores in groups.items():
                before = together.pop(size, None)
                together[size] = alone if before is None else torch.logaddexp(before, alone)
                if number % size == 0:
                    mean = together.pop(size) - math.log(size)
                    scores[number // size - 1].add(mean, labels)
    return [
        _predictor("scaled", 1, [scaled]),
        _predictor("single", 1, groups[1]),
        *(_predictor("mean", size, scores) for size, scores in groups.items()),
        _predictor("unscaled", 1, [unscaled]),
    ]


def require_ensemble(run: Run) -> None:
    """Refuse a run that has trained no subnetworks, because every step ran the whole network.

    Raises:
        ConfigError: when every block always survives, or a closed block saves only its backward
            pass.
    """
    survival = run.config.survival
    if survival.rule == "constant" or survival.final == 1:
        why = "has constant depth"
    elif survival.closed == "forward-only":
        why = "has survival.closed forward-only"
    else:
        return
    raise ConfigError(
        f"{run.path} {why}: it is no ensemble, every training step ran the whole network; give "
        "runs whose blocks are skipped"
    )


def draw_subnetwork(seed: int, member: int, survival: tuple[float, ...]) -> Tensor:
    """The gates of one member, bool [L]; they are independent of the gates of training steps."""
    p = torch.tensor(survival, dtype=torch.float64)
    return uniforms(len(survival), "subnetwork", seed, member) < p


def sizes_up_to(subnetworks: int) -> list[int]:
    """1, 2, 4, ..., and `subnetworks`."""
    return sorted({*(2**i for i in range(subnetworks.bit_length())), subnetworks})


def _predictor(
    name: Literal["scaled", "single", "mean", "unscaled"], members: int, scores: Sequence[Score]
) -> Predictor:
    error, nll, ece = (
        Spread.of([getattr(score, figure) for score in scores])
        for figure in ("error", "nll", "ece")
    )
    return Predictor(
        name,
        members,
        *(error.mean, error.deviation, nll.mean, nll.deviation, ece.mean, ece.deviation),
    )


NAMES = {
    "mean": "mean of M sampled networks",
    "scaled": "full network, scaled by p_l",
    "single": "one sampled network",
    "unscaled": "full network, not scaled",
}
"""What each predictor is called in tables and figures; M is the number of its members."""


def ensemble_table(title: str, of_runs: list[list[Predictor]]) -> Table:
    """A row for each predictor; for a single run, the deviation is that over subnetworks."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("test error, %", "NLL, nats", "ECE, %"):
        table.add_column(column, justify="right", no_wrap=True)
    for same in zip(*of_runs, strict=True):
        first = same[0]
        if (first.name, first.members) == ("mean", 1):
            continue  # the same as "single"
        figures = (
            _figure(first.error, first.error_deviation, [p.error for p in same], 2),
            _figure(first.nll, first.nll_deviation, [p.nll for p in same], 4),
            _figure(
                100 * first.ece,
                None if first.ece_deviation is None else 100 * first.ece_deviation,
                [100 * p.ece for p in same],
                2,
            ),
        )
        table.add_row(NAMES[first.name].replace("M", str(first.members)), *figures)
    return table


def _figure(value: float, deviation: float | None, of_runs: list[float], digits: int) -> str:
    spread = Spread(value, deviation) if len(of_runs) == 1 else Spread.of(of_runs)
    return plus_minus(spread, digits)
