"""BatchNorm's running statistics measured anew, for a network that lost some of its blocks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochastic_depth.data.protocol import Batch
from stochastic_depth.train.execution import Execution


def recalibrated(model: nn.Module, batches: Iterable[Batch], execution: Execution) -> list[Tensor]:
    """The running statistics that `model` would have on `batches` as it is now; it stays as it is.

    As torch.optim.swa_utils.update_bn: the plain mean of the statistics of all batches. But the
    model stays in evaluation mode, its normalisations alone are in training mode, so that no gates
    are drawn and its subnetwork stays the one that is entered.

    Returns:
        What `with_statistics` takes. Those of blocks that were not executed are of no use.
    """
    norms = _norms(model)
    momenta = [norm.momentum for norm in norms]
    modes = [norm.training for norm in norms]
    with with_statistics(model, _statistics(model)), torch.no_grad():
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a cumulative average
                norm.training = True
            for images, _ in batches:
                with execution.autocast():
                    model(images)
        finally:
            for norm, momentum, training in zip(norms, momenta, modes, strict=True):
                norm.momentum, norm.training = momentum, training
        return [statistic.clone() for statistic in _statistics(model)]


@contextmanager
def with_statistics(model: nn.Module, statistics: Sequence[Tensor]) -> Iterator[None]:
    """While entered, `model` normalises by `statistics`; then by its own again."""
    mine = _statistics(model)
    before = [statistic.clone() for statistic in mine]
    _put(mine, statistics)
    try:
        yield
    finally:
        _put(mine, before)


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _statistics(model: nn.Module) -> list[Tensor]:
    return [buffer for norm in _norms(model) for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def _put(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
