"""TensorBoard: which blocks ran, how many, and how many are expected."""

import tempfile

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

model = CifarResNet(20)
handle = sd.apply(model, sd.LinearDecay(0.5), schedule=sd.Warmup(20))

folder = tempfile.mkdtemp()
with SummaryWriter(folder) as writer:
    for step in range(40):
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        writer.add_scalar("depth/expected", handle.expected_depth, step)
        writer.add_scalar("depth/active", handle.gates.sum(), step)
        for block, is_open in zip(handle.blocks, handle.gates.int(), strict=True):
            writer.add_scalar(f"gates/{block.name}", is_open, step)

events = EventAccumulator(folder).Reload()
expected = [event.value for event in events.Scalars("depth/expected")]
active = [event.value for event in events.Scalars("depth/active")]
print(
    f"expected depth: {expected[0]:.2f}, {expected[10]:.2f}, {expected[20]:.2f}, {expected[-1]:.2f}"
)
print(f"active blocks, mean of the last 20 steps: {sum(active[20:]) / 20:.2f}")
for tag in ("blocks.0", "blocks.8"):
    ran = [event.value for event in events.Scalars(f"gates/{tag}")]
    print(f"{tag} ran in {sum(ran):.0f} of {len(ran)} steps")
