"""Does the saving arrive in other people's models? Half of the blocks closed, against all open.

    pip install timm; python tools/saving_models.py

For each model: the share of a training step's FLOPs in every other block, the share of its time
that closing them saves (medians, in turns, one process), and the ratio of the two.
"""

import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

if torch.version.cuda is None:  # torchvision's wheels miss two operators on a CPU build of torch
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm

import stochastic_depth as sd
from stochastic_depth.gates import Gate
from stochastic_depth.timing import take_turns

MODELS = {
    "resnet50": (16, 128),
    "vit_small_patch16_224": (4, 224),
    "convnext_tiny": (8, 128),
    "swin_tiny_patch4_window7_224": (4, 224),
}
"""Batch and image size."""
ROUNDS = 5


def training_step(
    model: nn.Module, depth: sd.StochasticDepth, images: Tensor, gates: list[bool]
) -> Callable[[], None]:
    """A step under given gates; `model.forward` instead of `model()`, which would draw others."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        for block, is_open in zip(depth.blocks, gates, strict=True):
            block.open_in_training(Gate(is_open))
        optimizer.zero_grad()
        model.forward(images).sum().backward()
        optimizer.step()

    return step


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{'model':30}  blocks  FLOPs closed  time saved  ratio")
    for name, (batch, size) in MODELS.items():
        model, images = timm.create_model(name), torch.randn(batch, 3, size, size)
        depth = sd.apply(model, sd.Uniform(0.5), example=images[:2])
        summary = sd.summary(model, images[:1])
        half = [number % 2 == 0 for number in range(len(depth.blocks))]
        closed = sum(
            block.forward + block.backward
            for block, is_open in zip(summary.blocks, half, strict=True)
            if not is_open
        )
        share = closed / (summary.forward + summary.backward)
        model.train()
        steps = {
            "open": training_step(model, depth, images, [True] * len(half)),
            "half": training_step(model, depth, images, half),
        }
        rounds = list(take_turns(steps, ROUNDS, warmup=1))
        seconds = {key: statistics.median(r[key] for r in rounds) for key in steps}
        saved = 1 - seconds["half"] / seconds["open"]
        print(f"{name:30}  {len(half):6}  {share:12.3f}  {saved:10.3f}  {saved / share:5.2f}")


if __name__ == "__main__":
    main()
