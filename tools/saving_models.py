"""Does the saving arrive in other people's models? python tools/saving_models.py --out FILE

Batch gates: training steps with every other block closed, once the odd and once the even ones,
against all open, in turns: time saved over FLOPs saved, of both together, because attention takes
more time for its FLOPs than the layers it alternates with. Five models are published ones; the
others are written in ways that could not be rewritten before blocks were deferred (run it in the
environment of `make coverage-models`, which has their libraries). Subset gates: training steps of a
ViT in which every branch runs on half of the samples, drawn in each step, against all of them.

    python tools/saving_models.py --out FILE --only diffusers/DiT   # the others stay in the file
"""

import argparse
import json
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.extras import import_torchvision
from stochastic_depth.models.published import published
from stochastic_depth.surgery.applied import applied_to
from stochastic_depth.surgery.example import caller
from stochastic_depth.surgery.proof.training import train_once
from stochastic_depth.timing import take_turns

PUBLISHED = {
    "timm/resnet50": (16, (3, 128, 128)),
    "timm/vit_small_patch16_224": (4, None),
    "timm/convnext_tiny": (8, (3, 128, 128)),
    "transformers/gpt2": (2, (128,)),
    "timm/swin_tiny_patch4_window7_224": (4, None),
}
"""Batch, and shape of a sample where it is not the published one."""
DEPTH, WIDTH = 8, 384
SUBSET = ("timm/vit_small_patch16_224", 16)
ROUNDS = 9

import_torchvision()  # before libraries that need it


def dit() -> tuple[nn.Module, Any]:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=WIDTH // 6, num_layers=DEPTH, sample_size=32
    )
    steps, labels = torch.tensor([1, 2]), torch.tensor([3, 4])
    images = torch.randn(2, 4, 32, 32)
    return model, {"hidden_states": images, "timestep": steps, "class_labels": labels}


def decoder() -> tuple[nn.Module, Any]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=WIDTH, depth=DEPTH, heads=6)
    model = TransformerWrapper(num_tokens=1000, max_seq_len=128, attn_layers=layers)
    return model, torch.randint(0, 1000, (4, 128))


def vit() -> tuple[nn.Module, Any]:
    from vit_pytorch import ViT

    model = ViT(
        image_size=224,
        patch_size=16,
        num_classes=1000,
        dim=WIDTH,
        depth=DEPTH,
        heads=6,
        mlp_dim=4 * WIDTH,
    )
    return model, torch.randn(4, 3, 224, 224)


def mamba() -> tuple[nn.Module, Any]:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(
        vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=DEPTH, use_cache=False
    )
    return MambaModel(config), torch.randint(0, 1000, (4, 64))


def conformer() -> tuple[nn.Module, Any]:
    from torchaudio.models import Conformer

    model = Conformer(WIDTH, 6, 4 * WIDTH, DEPTH, depthwise_conv_kernel_size=31)
    return model, (torch.randn(4, 128, WIDTH), torch.full((4,), 128))


LAYERED = {
    "diffusers/DiT": dit,
    "x_transformers/Decoder": decoder,
    "vit_pytorch/ViT": vit,
    "transformers/mamba": mamba,
    "torchaudio/Conformer": conformer,
}
"""Of eight layers of width 384, at sizes where a layer takes tens of milliseconds."""


def batch_gates(names: Sequence[str]) -> dict[str, dict[str, object]]:
    results = {}
    print(f"{'model':34}  blocks  FLOPs saved  time saved  ratio  mechanism")
    for name in names:
        torch.manual_seed(0)
        if name in LAYERED:
            model, example = LAYERED[name]()
        else:
            batch, shape = PUBLISHED[name]
            model, example = published(name, batch=batch, shape=shape)
        handle = sd.apply(model, sd.Uniform(0.5), example=example)
        found = applied_to(model).found
        odd = [n % 2 == 1 for n in range(len(found))]
        patterns = {"all": [True] * len(found), "odd": odd, "even": [not gate for gate in odd]}
        steps = {key: training_step(model, example, handle, p) for key, p in patterns.items()}
        rounds = list(take_turns(steps, ROUNDS, warmup=1))
        seconds = {key: statistics.median(r[key] for r in rounds) for key in steps}
        costs = sd.summary(model, example)
        flops = statistics.mean(costs.saving(patterns[key]) for key in ("odd", "even"))
        time = 1 - (seconds["odd"] + seconds["even"]) / 2 / seconds["all"]
        mechanisms = Counter(each.mechanism for each in found)
        print(
            f"{name:34}  {len(found):6}  {flops:11.3f}  {time:10.3f}  {time / flops:5.2f}  "
            f"{', '.join(mechanisms)}",
            flush=True,
        )
        results[name] = {
            "blocks": len(found),
            "mechanisms": mechanisms,
            "flops_saved": flops,
            "time_saved": time,
            "seconds": seconds,
        }
    return results


def training_step(
    model: nn.Module, example: Any, handle: sd.Handle, gates: Sequence[bool]
) -> Callable[[], None]:
    """A forward and a backward pass under the given gates."""
    run = caller(model.train(), example)

    def step() -> None:
        with handle.forced(gates):
            train_once(run)

    return step


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
    known = [*PUBLISHED, *LAYERED, "subset"]
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--only", nargs="+", choices=known, default=known)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    earlier = bool(asked.out) and asked.out.exists()
    results = json.loads(asked.out.read_text()) if earlier else {"batch": {}}
    results["batch"] |= batch_gates([name for name in asked.only if name != "subset"])
    if "subset" in asked.only:
        results["subset"] = subset_gates()
    if asked.out:
        asked.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
