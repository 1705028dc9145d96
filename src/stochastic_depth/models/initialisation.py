"""Initial weights, drawn from a key so that building a model does not change the random state.

A model is built under `with torch.device("meta")`, which keeps PyTorch's own initialisation from
drawing random numbers. `initialise` then allocates its modules on the CPU and sets their weights.
"""

import math

import torch
from torch import nn

from stochastic_depth.choices import Initialisation
from stochastic_depth.randomness import generator
from stochastic_depth.residual import Residual


@torch.no_grad()
def initialise(model: nn.Module, init: Initialisation, seed: int) -> None:
    """Set every weight and statistic of `model`, in place, as a function of (`init`, `seed`).

    Convolutions are normal with variance 2 / fan_out (He et al. 2015, arXiv:1502.01852). Linear
    layers are uniform in +-1 / sqrt(fan_in). Normalisations have gain 1 and bias 0. Under
    "zero-gain" the last gain of each residual branch starts at 0 instead (Goyal et al. 2017,
    arXiv:1706.02677); otherwise networks of 110 layers and more do not leave chance level in their
    first epochs. Where a branch has no BatchNorm, its last linear layer starts at 0. Modules of any
    other kind stay on the meta device, where using them is an error.

    If the caller has entered `torch.device("meta")` itself, nothing is set: the model has shapes
    only.
    """
    if torch.get_default_device().type == "meta":
        return
    rng = generator("weights", seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm):
            module.to_empty(device="cpu")
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
            module.weight.normal_(0, math.sqrt(2 / fan_out), generator=rng)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            module.weight.uniform_(-bound, bound, generator=rng)
            module.bias.uniform_(-bound, bound, generator=rng)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.fill_(1)
            module.bias.zero_()
            module.reset_running_stats()
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    if init == "zero-gain":
        for module in model.modules():
            if isinstance(module, Residual):
                layers = list(module.branch.modules())
                norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
                last = norms or [layer for layer in layers if isinstance(layer, nn.Linear)]
                last[-1].weight.zero_()
                last[-1].bias.zero_()
