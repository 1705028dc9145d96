"""Accelerate: one draw per optimizer step, whatever the accumulation, and resuming."""

import tempfile

import torch
import torch.nn.functional as F
from accelerate import Accelerator, skip_first_batches
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from stochastic_depth.integrations.accelerate import follow
from stochastic_depth.models import CifarResNet

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
data = TensorDataset((images.float() / 16).view(-1, 1, 8, 8), labels)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)

model = CifarResNet(20, channels=1)
sd.apply(model)  # before prepare, which may wrap the model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, 128))
follow(accelerator, model, optimizer)  # gates by its steps; saved with the accelerator's state


def train(first, last):
    for _, (x, y) in zip(range(first, last), skip_first_batches(loader, first), strict=False):
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return model.head.weight.detach().clone()


with tempfile.TemporaryDirectory() as folder:
    train(0, 6)
    accelerator.save_state(folder)
    straight = train(6, 14)
    accelerator.load_state(folder)
    print("as if never stopped, bit for bit:", torch.equal(train(6, 14), straight))
