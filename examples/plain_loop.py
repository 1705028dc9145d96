"""A plain PyTorch loop, with and without stochastic depth: the line to add, and what it saves."""

import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = (images.float() / 16).view(-1, 1, 8, 8)

models = {"constant": CifarResNet(56, channels=1), "stochastic": CifarResNet(56, channels=1)}
handle = sd.apply(models["stochastic"], sd.LinearDecay(0.5))  # the only line to add
optimizers = {name: torch.optim.AdamW(m.parameters(), lr=3e-3) for name, m in models.items()}
seconds = {name: [] for name in models}


def train_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()


for _ in range(40):
    chosen = torch.randint(len(images), (64,))
    for name, model in models.items():  # alternately, so that both see the same load
        start = time.perf_counter()
        train_step(model, optimizers[name], images[chosen], labels[chosen])
        seconds[name].append(time.perf_counter() - start)

constant, stochastic = (statistics.mean(seconds[name]) for name in models)
print(f"{1000 * constant:.1f} ms a step with all {len(handle.blocks)} blocks")
print(f"{1000 * stochastic:.1f} ms with {handle.expected_depth:g} of them, on average")
print(f"{100 * (1 - stochastic / constant):.0f} % of the time saved")
