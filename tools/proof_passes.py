"""How many forward passes `sd.apply` takes, and how long: python tools/proof_passes.py

In the environment of `make coverage-models`. Printed are the blocks, the forward passes (those that
find the blocks, those that prove them in evaluation and in training mode), the seconds of
`sd.apply` and those of one forward pass.

    python tools/proof_passes.py --only SwinUNETR
"""

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from coverage_models import call, called_first, counting
from coverage_oracle import Watch
from torch import nn

import stochastic_depth as sd
from stochastic_depth.models.published import published
from stochastic_depth.surgery.applied import applied_to

Made = tuple[nn.Module, Any]


def swin_unetr() -> Made:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(1, 2, feature_size=24), torch.randn(1, 1, 64, 64, 64)


def of(name: str, *shape: int, **options: Any) -> Callable[[], Made]:
    return lambda: published(name, shape=shape, **options)


MODELS: dict[str, Callable[[], Made]] = {
    "SwinUNETR": swin_unetr,
    "timm/resnet152": of("timm/resnet152", 3, 64, 64),
    "timm/resnetv2_101": of("timm/resnetv2_101", 3, 64, 64),
    "timm/convnext_base": of("timm/convnext_base", 3, 64, 64),
    "timm/vit_base_patch16_224": of("timm/vit_base_patch16_224", 3, 64, 64, img_size=64),
    "timm/swin_small_patch4_window7_224": of(
        "timm/swin_small_patch4_window7_224", 3, 112, 112, img_size=112
    ),
    "timm/regnetx_064": of("timm/regnetx_064", 3, 64, 64),
    "transformers/gpt2": of("transformers/gpt2", 32, n_layer=48, n_embd=256, n_head=4),
    "transformers/bert": of(
        "transformers/bert", 32, num_hidden_layers=24, hidden_size=512, num_attention_heads=8
    ),
    "transformers/llama": of(
        "transformers/llama",
        32,
        num_hidden_layers=32,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1000,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'model':36} parameters blocks passes sd.apply   one pass")
    for name in asked.only:
        torch.manual_seed(0)
        model, example = MODELS[name]()
        once = called_first(model, example)
        began = time.process_time()
        call(model.eval(), example, Watch(), False)
        one = time.process_time() - began
        counts = counting(model, once)
        began = time.process_time()
        sd.apply(model, example=example)
        seconds = time.process_time() - began
        branches = {inner for block in applied_to(model).found for inner in block.modules}
        passes = max(counts[inner] for inner in once if inner not in branches)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        blocks = len(applied_to(model).found)
        print(
            f"{name:36} {parameters:8.1f} M {blocks:6} {passes:6} {seconds:6.1f} s {one:8.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
