"""Which architectures `sd.apply(model, example=x)` makes skippable: make coverage-models.

Every architecture is built without trained weights, applied with verification on a small input, and
removed again. One that cannot be made skippable must raise the clear error and be left untouched.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import stochastic_depth as sd

if torch.version.cuda is None:  # torchvision's wheels miss two operators on a CPU build of torch
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 regnet_y_400mf regnet_x_400mf mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small efficientnet_b0 efficientnet_v2_s convnext_tiny swin_t "
    "swin_v2_t vit_b_32"
).split()
TIMM = (
    "resnet18 resnet26d resnet50d seresnet50 resnetv2_50 ecaresnet26t skresnet18 resnest14d "
    "res2net50_26w_4s nf_resnet26 nfnet_f0 regnety_002 convnext_atto convnextv2_atto "
    "vit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 "
    "cait_xxs24_224 xcit_nano_12_p16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 "
    "mixer_s16_224 resmlp_12_224 gmlp_s16_224 poolformer_s12 caformer_s18 mobilenetv2_050 "
    "mobilenetv3_small_050 efficientnet_b0 efficientvit_b0 maxvit_tiny_rw_224 coatnet_nano_rw_224 "
    "levit_128s pit_ti_224 twins_svt_small pvt_v2_b0 davit_tiny focalnet_tiny_srf fastvit_t8 "
    "edgenext_xx_small mobilevit_xxs repvit_m0_9 hiera_tiny_224 tiny_vit_5m_224 visformer_tiny "
    "crossvit_tiny_240 inception_resnet_v2 darknet53 cspresnet50 hrnet_w18_small sequencer2d_s "
    "densenet121 dpn68 vgg11"
).split()


@dataclass(frozen=True)
class Verdict:
    """What came of one architecture."""

    library: str
    architecture: str
    verdict: str
    """skippable, refused, not residual, or broken."""
    blocks: int
    seconds: float
    reason: str = ""


def torchvision_models() -> Iterator[tuple[str, Callable[[], nn.Module], object]]:
    from torchvision import models

    for name in TORCHVISION:
        size = 224 if name.startswith("vit") else 64
        yield name, lambda name=name: models.get_model(name), torch.randn(2, 3, size, size)


def timm_models() -> Iterator[tuple[str, Callable[[], nn.Module], object]]:
    import timm

    for name in TIMM:
        published = timm.models.get_pretrained_cfg(name)
        size = published.input_size[-1] if published else 224
        yield name, lambda name=name: timm.create_model(name), torch.randn(2, 3, size, size)


def transformers_models() -> Iterator[tuple[str, Callable[[], nn.Module], object]]:
    import transformers as t

    text = {"input_ids": torch.arange(24).view(2, 12) % 90, "use_cache": False}
    plain = {"input_ids": torch.arange(24).view(2, 12) % 90}
    image = {"pixel_values": torch.randn(2, 3, 32, 32)}
    small = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    vision = {k: v for k, v in small.items() if k != "vocab_size"}
    vision |= {"image_size": 32, "patch_size": 8}
    llama = {**small, "num_key_value_heads": 2}
    configurations = {
        "gpt2": (t.GPT2Config(vocab_size=99, n_embd=32, n_layer=3, n_head=4), text),
        "llama": (t.LlamaConfig(**llama), text),
        "mistral": (t.MistralConfig(**llama), text),
        "qwen2": (t.Qwen2Config(**llama), text),
        "gpt_neox": (t.GPTNeoXConfig(**small), text),
        "opt": (
            t.OPTConfig(
                vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
                ffn_dim=64, word_embed_proj_dim=32,
            ),
            text,
        ),
        "vit": (t.ViTConfig(**vision), image),
        "deit": (t.DeiTConfig(**vision), image),
        "dinov2": (t.Dinov2Config(**vision), image),
        "beit": (t.BeitConfig(**vision), image),
        "convnext": (t.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1]), image),
        "resnet": (
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2]), image,
        ),
        "bert": (t.BertConfig(**small), plain),
        "t5": (
            t.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
            {**plain, "decoder_input_ids": plain["input_ids"], "use_cache": False},
        ),
    }  # fmt: skip
    for name, (config, example) in configurations.items():
        yield name, lambda config=config: t.AutoModel.from_config(config), example


LIBRARIES = {
    "torchvision": torchvision_models,
    "timm": timm_models,
    "transformers": transformers_models,
}


def judge(library: str, name: str, build: Callable[[], nn.Module], example: object) -> Verdict:
    """Apply, remove, and see that a refusal leaves the model as it was."""
    model = build()
    types = [type(module) for module in model.modules()]
    began = time.perf_counter()
    blocks, verdict, reason = 0, "skippable", ""
    try:
        blocks = len(sd.apply(model, example=example).survival)
        sd.remove(model)
    except sd.UnsupportedBlockError as error:
        verdict, reason = "refused", str(error)
    except sd.ApplyError as error:
        verdict, reason = "not residual", str(error)
    except Exception as error:
        verdict, reason = "broken", f"{type(error).__name__}: {error}"
    if [type(module) for module in model.modules()] != types:
        verdict, reason = "broken", f"left changed; {reason}"
    seconds = round(time.perf_counter() - began, 2)
    return Verdict(library, name, verdict, blocks, seconds, " ".join(reason.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=LIBRARIES, action="append")
    parser.add_argument("--only", action="append", help="architectures, by name")
    parser.add_argument("--out", type=Path, help="write the verdicts as JSON")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    verdicts: list[Verdict] = []
    for library in asked.library or LIBRARIES:
        for name, build, example in LIBRARIES[library]():
            if asked.only and name not in asked.only:
                continue
            verdicts.append(judge(library, name, build, example))
            last = verdicts[-1]
            print(f"{library:12} {name:32} {last.verdict:12} {last.blocks:4} {last.reason[:300]}")
    table = Table(title="Architectures")
    for column in ("library", "skippable", "refused", "not residual", "broken"):
        table.add_column(column)
    for library in asked.library or LIBRARIES:
        mine = [v.verdict for v in verdicts if v.library == library]
        table.add_row(library, *(str(mine.count(column.header)) for column in table.columns[1:]))
    Console().print(table)
    if asked.out:
        asked.out.write_text(json.dumps([asdict(v) for v in verdicts], indent=1) + "\n")


if __name__ == "__main__":
    main()
