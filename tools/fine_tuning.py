"""What drop rates and scalings do to weights that were trained at constant depth.

    python tools/fine_tuning.py --seeds 3

A ResNet-38 learns the digits; then it is fine-tuned on 300 of them turned by 90 degrees. Prints the
table of docs/how-to/fine-tune.md: test errors before the first step (of upright digits) and after
the last one (of turned ones), and the processor's time for fine-tuning, relative to constant depth.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

STEPS, BATCH, IMAGES = 60, 100, 300
WAYS: dict[str, Callable[[nn.Module, int], object]] = {
    "constant depth": lambda model, seed: None,
    "`drop_rate=0.1`": lambda model, seed: sd.apply(model, drop_rate=0.1, seed=seed),
    "`drop_rate=0.2`": lambda model, seed: sd.apply(model, drop_rate=0.2, seed=seed),
    "`sd.LinearDecay(0.8)`, scaled in evaluation": lambda model, seed: sd.apply(
        model, sd.LinearDecay(0.8), scale="inference", seed=seed
    ),
    "`drop_rate=0.5`": lambda model, seed: sd.apply(model, drop_rate=0.5, seed=seed),
    "`sd.LinearDecay(0.5)`, scaled in evaluation": lambda model, seed: sd.apply(
        model, sd.LinearDecay(0.5), scale="inference", seed=seed
    ),
    '`sd.LinearDecay(0.5)`, `closed="forward-only"`': lambda model, seed: sd.apply(
        model, sd.LinearDecay(0.5), closed="forward-only", seed=seed
    ),
}


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, rate: float) -> float:
    """Take `steps` steps; returns the processor's seconds."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began = time.process_time()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    return time.process_time() - began


@torch.no_grad()
def error(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of `images` [batch, 3, height, width] that `model` takes for something else."""
    return 100 * (model.eval()(images).argmax(1) != labels).float().mean().item()


def measured(seed: int) -> dict[str, tuple[float, float, float]]:
    """Of each way: the error before and after, and seconds."""
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    images, labels = images.expand(-1, 3, -1, -1), torch.tensor(digits.target)[order]
    turned, test = images.rot90(dims=(2, 3)), slice(1300, None)
    trained = CifarResNet(38)
    train(trained, images[:1300], labels[:1300], steps=130, rate=0.1)
    found = {}
    for name, apply in WAYS.items():
        torch.manual_seed(seed)
        model = copy.deepcopy(trained)
        apply(model, seed)
        before = error(model, images[test], labels[test])
        seconds = train(model, turned[:IMAGES], labels[:IMAGES], STEPS, rate=0.02)
        found[name] = (before, error(model, turned[test], labels[test]), seconds)
        print(f"seed {seed}: {name}: {found[name]}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = [measured(seed) for seed in range(parser.parse_args().seeds)]
    print("| | test error before a step | after fine-tuning | processor time |\n|---|---|---|---|")
    for name in WAYS:
        before, after, _ = zip(*(found[name] for found in seeds), strict=True)
        time_of = [found[name][2] / found["constant depth"][2] for found in seeds]
        spread = f" ± {statistics.stdev(after):.1f}" if len(after) > 1 else ""
        print(
            f"| {name} | {statistics.mean(before):.1f} % | {statistics.mean(after):.1f}{spread} % "
            f"| {statistics.mean(time_of):.2f} |"
        )


if __name__ == "__main__":
    main()
