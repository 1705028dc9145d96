"""The implicit ensemble: is the network scaled by p_l as good as the 2^L networks it stands for?"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stochastic_depth.analysis.comparison import Spread
from stochastic_depth.analysis.score import Score
from stochastic_depth.analysis.trained import Progress, Trained, read_found, write_found
from stochastic_depth.errors import ConfigError
from stochastic_depth.randomness import uniforms
from stochastic_depth.train import Run


@dataclass(frozen=True)
class Predictor:
    """One way to predict, measured on the test images."""

    name: Literal["scaled", "single", "mean", "unscaled"]
    """The full network times p_l; one subnetwork, drawn as in training; the mean of the
    probabilities of several; the full network without p_l, each branch as in a training step.

    Of "single" and "mean" all figures are means: over the subnetworks drawn, and over the disjoint
    groups of `members` that they make.
    """
    members: int
    """How many networks predict together."""
    error: float
    """Percent."""
    error_deviation: float | None
    """Of "single" over the subnetworks, of "mean" over the groups of subnetworks; None of one."""
    nll: float
    """Mean negative log-likelihood, nats."""
    nll_deviation: float | None
    ece: float
    """Expected calibration error in 15 bins of equal width, 0..1."""
    ece_deviation: float | None


def measured_ensemble(
    network: Trained, subnetworks: int, seed: int, progress: Progress, again: bool = False
) -> list[Predictor]:
    """`ensemble`, written to the run's `analysis/ensemble.json`, or read where it was before.

    Args:
        again: measure again what was measured before.
    """
    settings = {
        "checkpoint_step": network.step,
        "images": network.images.sizes["test"],
        "seed": seed,
        "subnetworks": subnetworks,
    }

    def understood(found: dict[str, Any]) -> list[Predictor]:
        return [Predictor(**predictor) for predictor in found["predictors"]]

    before = None if again else read_found(network.run, "ensemble", settings, understood)
    if before is not None:
        return before
    predictors = ensemble(network, subnetworks, seed, progress)
    rows = [asdict(predictor) for predictor in predictors]
    write_found(network.run, "ensemble", {**settings, "predictors": rows})
    return predictors


@torch.inference_mode()
def ensemble(network: Trained, subnetworks: int, seed: int, progress: Progress) -> list[Predictor]:
    """Every predictor on every test image, each image read once.

    Args:
        subnetworks: how many are drawn; "mean" is told for 1, 2, 4, ... of them.
        seed: which are drawn; a function of (seed, member), p_l as of the checkpoint.

    Raises:
        ConfigError: when the run has constant depth, so that there is one subnetwork only.
    """
    handle, execution = network.handle, network.run.execution
    refuse_constant(network.run)
    members = [drawn(seed, member, handle.survival) for member in range(subnetworks)]
    scaled, unscaled = Score(), Score()
    groups = {
        size: [Score() for _ in range(subnetworks // size)] for size in sizes_up_to(subnetworks)
    }
    total = network.images.sizes["test"] * (subnetworks + 2)
    done = 0

    def predict(images: Tensor) -> Tensor:
        nonlocal done
        done += len(images)
        progress("predicting", done, total)
        with execution.autocast():
            return F.log_softmax(network.model(images).double(), 1)

    for images, labels in network.images.evaluate("test"):
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


def refuse_constant(run: Run) -> None:
    """Raise `ConfigError` when every block of a run always survives."""
    survival = run.config.survival
    if survival.rule == "constant" or survival.final == 1:
        raise ConfigError(
            f"{run.path} has constant depth: it is no ensemble, its only subnetwork is itself; "
            "give runs with stochastic depth"
        )


def drawn(seed: int, member: int, survival: tuple[float, ...]) -> Tensor:
    """The gates of one member, bool [L]: other ones than those of any training step."""
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
