"""Does the saving arrive in other people's models? python tools/saving_models.py --out FILE

Batch gates: training steps with every other block closed, against all open (`sd.verify`): time
saved over FLOPs saved. Subset gates: training steps of a ViT in which every branch runs on half of
the samples, drawn anew in each step, against all of them.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

if torch.version.cuda is None:  # torchvision's wheels miss two operators on a CPU build of torch
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import stochastic_depth as sd
from stochastic_depth.models.published import published
from stochastic_depth.timing import take_turns

MODELS = {
    "timm/resnet50": (16, (3, 128, 128)),
    "timm/vit_small_patch16_224": (4, None),
    "timm/convnext_tiny": (8, (3, 128, 128)),
    "transformers/gpt2": (2, (128,)),
    "timm/swin_tiny_patch4_window7_224": (4, None),
}
"""Batch, and shape of a sample where it is not the published one."""
SUBSET = ("timm/vit_small_patch16_224", 16)
ROUNDS = 9


def batch_gates() -> dict[str, dict[str, object]]:
    results = {}
    print(f"{'model':34}  blocks  FLOPs closed  time saved  ratio")
    for name, (batch, shape) in MODELS.items():
        model, example = published(name, batch=batch, shape=shape)
        sd.apply(model, sd.Uniform(0.5), example=example)
        seen = sd.verify(model, example, repeats=ROUNDS)
        saved = 1 - seen.seconds[1] / seen.seconds[0]
        print(
            f"{name:34}  {seen.blocks:6}  {1 - seen.flops[1]:12.3f}  {saved:10.3f}  "
            f"{seen.efficiency:5.2f}",
            flush=True,
        )
        results[name] = {**asdict(seen), "efficiency": seen.efficiency}
    return results


def subset_gates() -> dict[str, object]:
    name, batch = SUBSET
    model, example = published(name, batch=batch)
    constant, _ = published(name, batch=batch)
    handle = sd.apply(model, sd.Uniform(0.5), example=example, gate="subset", skipped="freeze")
    shares: list[float] = []

    def step(model: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            model.zero_grad()
            model.train()(example).sum().backward()

        return run

    rounds = []
    for seconds in take_turns({"all": step(constant), "half": step(model)}, ROUNDS, warmup=1):
        rounds.append(seconds)
        shares.append(handle.gates.double().mean().item())
    time = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    costs = sd.summary(model, example)
    branches = sum(b.forward + b.backward for b in costs.blocks) / (costs.forward + costs.backward)
    saved, expected = 1 - time["half"] / time["all"], branches * (1 - statistics.mean(shares))
    print(
        f"{name}, gate='subset', batch {batch}: {100 * expected:.1f} % of FLOPs saved, "
        f"{100 * saved:.1f} % of time, ratio {saved / expected:.2f}"
    )
    return {"model": name, "batch": batch, "flops_saved": expected, "time_saved": saved}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    results = {"batch": batch_gates(), "subset": subset_gates()}
    if asked.out:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
