"""Batch normalisation over the mini-batches of all ranks together, also on CPUs."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stochastic_depth.errors import ConfigError


def synchronise_batchnorm(model: nn.Module) -> nn.Module:
    """Replace every batch normalisation of `model` by one over all ranks, with the same parameters.

    Every rank must run the same layers. With per-rank gates, or with subsets that may be empty on a
    rank (balanced ones never are), the other ranks would wait for ever. On a GPU this is
    `nn.SyncBatchNorm`, which does not run on a CPU.

    Returns:
        `model`, or the module that replaces it if it is itself a batch normalisation.
    """
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if type(module) is nn.SyncBatchNorm and all(t.device.type == "cpu" for t in tensors):
            module.__class__ = CpuSyncBatchNorm  # pyright: ignore[reportAttributeAccessIssue]
    return model


class CpuSyncBatchNorm(_BatchNorm):
    """Batch normalisation over the samples of all ranks, computed from two all-reduces of sums.

    Ioffe and Szegedy 2015, algorithm 1. input: [batch, channels, ...]; the batch may differ between
    ranks.

    Raises:
        ConfigError: in training, when all ranks together have one value per channel, or none.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        others, shape = [0, *range(2, input.ndim)], [1, -1, *[1] * (input.ndim - 2)]
        x = input if input.dtype == torch.float64 else input.float()
        count = _SumOverRanks.apply(x.new_tensor([x.numel() / x.shape[1]]))
        if count < 2:
            raise ConfigError(
                "batch normalisation needs more than one value per channel to train, and all ranks "
                f"together have {count.item():.0f}; the input has the shape {list(input.shape)}: "
                "use larger mini-batches"
            )
        mean = _SumOverRanks.apply(x.sum(others)) / count
        centred = x - mean.view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(others)) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions."""

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        weight = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks; its gradient is the sum over all ranks too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _SumOverRanks.forward(ctx, gradient)
