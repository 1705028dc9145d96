"""torch.compile: block by block, so that new gates compile nothing."""

import torch
from torch import nn

import stochastic_depth as sd


class Block(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


model = nn.Sequential(nn.Linear(64, 64), *(Block() for _ in range(12)))
handle = sd.apply(model, sd.LinearDecay(0.5), example=torch.randn(2, 64))
sd.compile_blocks(model)

patterns = set()
for _ in range(100):
    model(torch.randn(32, 64)).square().mean().backward()
    patterns.add(tuple(handle.gates.tolist()))
model.eval()(torch.randn(32, 64))

graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(f"{len(handle.blocks)} blocks, {len(patterns)} patterns of gates, {graphs} graphs compiled")
