"""Gradient accumulation: gates for each micro-batch, or for each optimizer step."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = (images.float() / 16).view(-1, 1, 8, 8)
MICRO_BATCHES = 4


def train(gates_for: str) -> None:
    model = CifarResNet(20, channels=1)
    handle = sd.apply(model, sd.LinearDecay(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(2):
        patterns = []
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            if gates_for == "step":  # otherwise each forward pass draws for the next number
                handle.step = step
            chosen = slice(micro + MICRO_BATCHES * step, None, 40)
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            (loss / MICRO_BATCHES).backward()
            patterns.append("".join("#" if b else "." for b in handle.gates))
        optimizer.step()
        print(f"step {step}, gates for each {gates_for:11}", *patterns)


train("micro-batch")
train("step")
