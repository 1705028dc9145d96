"""Activation checkpointing: blocks run again in the backward pass, under the same gates."""

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet


class Checkpointed(CifarResNet):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


def train_step(model, images):
    """Mebibytes kept for the backward pass, and the gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(images).square().mean()
    loss.backward()
    return sum(kept.values()) / 2**20, [p.grad for p in model.parameters()]


images, gradients = torch.randn(16, 3, 32, 32), []
for survival in (sd.Uniform(1.0), sd.LinearDecay(0.2)):
    for network in (CifarResNet(32), Checkpointed(32)):
        handle = sd.apply(network, survival, seed=2)
        kept, gradient = train_step(network, images)
        gradients.append(gradient)
        print(f"{type(network).__name__:12}  {handle.gates.sum():2} blocks  {kept:4.1f} MiB kept")
print("the same gradients:", all(map(torch.allclose, gradients[2], gradients[3])))
