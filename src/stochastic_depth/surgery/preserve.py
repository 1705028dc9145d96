"""Run a model and restore all of its state afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put the modes, buffers and gradients of `model`, and the random state, back afterwards.

    While entered, no module of it runs compiled: a compiler does not see the hooks and modes that
    look on, or refuses them.
    """
    compiled = [(module, module._compiled_call_impl) for module in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    for module, _ in compiled:
        module._compiled_call_impl = None
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices, key=str)):
            yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, content in buffers:
                buffer.copy_(content)
        for parameter, gradient in gradients:
            parameter.grad = gradient
