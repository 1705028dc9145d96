"""Which published architectures `sd.apply` makes skippable: make coverage-models.

Verified: architectures of all three libraries are built without trained weights, applied, which
holds every block against the original, and removed again.
Structure: every entry point of timm is built on the meta device; of those that consist of the same
classes the smallest is planned: every block found, cut, and seen to skip its branch.

An architecture that cannot be made skippable must raise the clear error and be left untouched.
"""

import argparse
import collections
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

if torch.version.cuda is None:  # torchvision's wheels miss two operators on a CPU build of torch
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import stochastic_depth as sd
from stochastic_depth.models.published import published
from stochastic_depth.surgery.apply import applied_to

TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 regnet_y_400mf regnet_x_400mf mnasnet0_5 "
    "mobilenet_v2 mobilenet_v3_small efficientnet_b0 efficientnet_v2_s convnext_tiny swin_t "
    "swin_v2_t r3d_18 mc3_18 r2plus1d_18 fcn_resnet50 googlenet squeezenet1_1 vgg11 "
    "shufflenet_v2_x0_5"
).split()
SIZES = {"r3d_18": (3, 4, 32, 32), "mc3_18": (3, 4, 32, 32), "r2plus1d_18": (3, 4, 32, 32)}
TIMM = (
    "resnet18 resnet26d resnet50d seresnet50 resnetv2_50 ecaresnet26t skresnet18 resnest14d "
    "res2net50_26w_4s nf_resnet26 nfnet_f0 regnety_002 convnext_atto convnextv2_atto "
    "vit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 "
    "cait_xxs24_224 xcit_nano_12_p16_224 swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 "
    "mixer_s16_224 resmlp_12_224 gmlp_s16_224 poolformer_s12 caformer_s18 mobilenetv2_050 "
    "mobilenetv3_small_050 mobilenetv4_conv_small efficientnet_b0 efficientvit_b0 "
    "maxvit_tiny_rw_224 coatnet_nano_rw_224 levit_128s pit_ti_224 twins_svt_small pvt_v2_b0 "
    "davit_tiny focalnet_tiny_srf fastvit_t8 edgenext_xx_small mobilevit_xxs repvit_m0_9 "
    "hiera_tiny_224 tiny_vit_5m_224 visformer_tiny crossvit_tiny_240 inception_resnet_v2 darknet53 "
    "cspresnet50 hrnet_w18_small sequencer2d_s mvitv2_tiny starnet_s1 mambaout_femto ghostnet_050 "
    "densenet121 dpn68 rexnet_100 vgg11"
).split()
TRANSFORMERS = (
    "gpt2 gpt_neo gpt_neox gptj opt bloom falcon llama mistral qwen2 qwen3 gemma gemma2 phi phi3 "
    "olmo2 cohere starcoder2 granite mixtral bert roberta electra distilbert albert deberta-v2 "
    "mpnet t5 mt5 bart pegasus whisper wav2vec2 hubert vit deit dinov2 beit swin swinv2 convnext "
    "convnextv2 resnet segformer clip_vision_model siglip_vision_model"
).split()
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
"""Fields of configurations of transformers; those that a configuration does not know do nothing."""
OWN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3},
    "falcon": {"num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "gptj": {"rotary_dim": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "mt5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64},
    "pegasus": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64},
    "whisper": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_source_positions": 40,
    },
    "wav2vec2": {"apply_spec_augment": False},
    "hubert": {"apply_spec_augment": False},
}
STAGED: dict[str, dict[str, Any]] = {
    "swin": {
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 12,
        "depths": [2, 2],
        "window_size": 4,
    },
    "swinv2": {
        "image_size": 64,
        "patch_size": 2,
        "embed_dim": 12,
        "depths": [2, 2],
        "window_size": 4,
    },
    "convnext": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "image_size": 32},
    "convnextv2": {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "image_size": 32},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "image_size": 32},
    "segformer": {"hidden_sizes": [8, 16, 32, 64], "image_size": 64},
}
"""Of networks in stages, which have no single size."""


@dataclass(frozen=True)
class Verdict:
    """What came of one architecture."""

    library: str
    architecture: str
    verdict: str
    """skippable, refused, not residual, or broken."""
    blocks: int = 0
    mechanisms: str = ""
    difference: float = 0.0
    """The largest one of verification, relative to the largest output."""
    seconds: float = 0.0
    reason: str = ""
    models: int = 1
    """How many entry points consist of the same classes."""


def architectures() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Library, name, and how to build it."""
    for name in TORCHVISION:
        yield "torchvision", name, {"shape": SIZES.get(name, (3, 64, 64))}
    for name in TIMM:
        yield "timm", name, {}
    for name in TRANSFORMERS:
        small = STAGED.get(name) or {
            "image_size": 32,
            "patch_size": 8,
            **SMALL,
            **OWN.get(name, {}),
        }
        yield "transformers", name, small


def judge(library: str, name: str, **options: Any) -> Verdict:
    """Apply, remove, and see that a refusal leaves the model as it was."""
    torch.manual_seed(0)
    try:
        model, example = published(f"{library}/{name}", **options)
    except Exception as error:
        return Verdict(library, name, "broken", reason=f"cannot be built: {_line(error)}")
    before = _look(model)
    began = time.perf_counter()
    blocks, mechanisms, difference, reason = 0, "", 0.0, ""
    try:
        blocks = len(sd.apply(model, example=example).blocks)
        applied = applied_to(model)
        mechanisms = ", ".join(sorted({block.mechanism for block in applied.found}))
        difference = applied.difference
        verdict = "skippable"
        sd.remove(model)
    except sd.ApplyError as error:
        refused = isinstance(error, sd.UnsupportedBlockError)
        verdict, reason = "refused" if refused else "not residual", _line(error)
    except Exception as error:
        verdict, reason = "broken", _line(error)
    seconds = round(time.perf_counter() - began, 2)
    if _look(model) != before:
        verdict, reason = "broken", f"left changed; {reason}"
    return Verdict(library, name, verdict, blocks, mechanisms, difference, seconds, reason)


def structure() -> Iterator[Verdict]:
    """All of timm, a representative for each set of classes."""
    import timm

    groups: dict[frozenset[type], list[tuple[int, str]]] = collections.defaultdict(list)
    for name in track(timm.list_models(), "building all of timm"):
        model, _ = published(f"timm/{name}", device="meta")
        size = sum(p.numel() for p in model.parameters())
        groups[frozenset(map(type, model.modules()))].append((size, name))
    for group in track(groups.values(), "planning"):
        name = min(group)[1]
        model, example = published(f"timm/{name}", device="meta")
        before = _look(model)
        blocks, mechanisms, reason = 0, "", ""
        try:
            plan = sd.plan(model, example)
            blocks = len(plan.blocks)
            mechanisms = ", ".join(sorted({block.mechanism for block in plan.blocks}))
            refused = [block for block in plan.blocks if block.refusal]
            verdict = "refused" if refused else "skippable"
            if refused:
                reason = f"{len(refused)} blocks, {refused[0].name!r}: {refused[0].refusal}"
        except sd.ApplyError as error:
            verdict, reason = "not residual", _line(error)
        except Exception as error:
            verdict, reason = "broken", _line(error)
        if _look(model) != before:
            verdict, reason = "broken", f"left changed; {reason}"
        yield Verdict("timm", name, verdict, blocks, mechanisms, reason=reason, models=len(group))


def _look(model: nn.Module) -> list[Any]:
    """What must be as before where a model is refused."""
    weights = [(name, id(value)) for name, value in model.state_dict(keep_vars=True).items()]
    modules = [(type(module), module.training, len(vars(module))) for module in model.modules()]
    return [modules, weights]


def _line(error: Exception) -> str:
    name = "" if isinstance(error, sd.StochasticDepthError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())


def report(title: str, verdicts: list[Verdict]) -> None:
    """How many, by library; and why not, one by one."""
    columns = ("skippable", "refused", "not residual", "broken")
    table = Table(title=title, title_justify="left")
    for column in ("library", *columns, "of the residual ones"):
        table.add_column(column, justify="left" if column == "library" else "right")
    for library in dict.fromkeys(verdict.library for verdict in verdicts):
        counts = collections.Counter[str]()
        for v in verdicts:
            counts[v.verdict] += v.models if v.library == library else 0
        residual = counts["skippable"] + counts["refused"]
        share = f"{100 * counts['skippable'] / max(1, residual):.1f} %"
        table.add_row(library, *(str(counts[column]) for column in columns), share)
    console = Console()
    console.print(table)
    for v in verdicts:
        if v.verdict in ("refused", "broken"):
            console.print(f"{v.library}/{v.architecture} ({v.models}): {v.reason}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="library/architecture, to be verified")
    parser.add_argument("--part", choices=("verified", "structure"), help="one of the two")
    parser.add_argument(
        "--out", type=Path, help="write the verdicts as JSON; with --part or --only into it"
    )
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, list[Verdict]] = {}
    if asked.part != "structure":
        results["verified"] = []
        for library, name, options in architectures():
            if asked.only and f"{library}/{name}" not in asked.only:
                continue
            last = judge(library, name, **options)
            results["verified"].append(last)
            print(
                f"{library:12} {name:32} {last.verdict:12} {last.blocks:4} {last.mechanisms:12} "
                f"{last.difference:7.1g} {last.seconds:6.1f} s  {last.reason[:200]}",
                flush=True,
            )
    if asked.part != "verified" and not asked.only:
        results["structure"] = list(structure())
    for title, verdicts in results.items():
        report(title, verdicts)
    if asked.out:
        part = (asked.part or asked.only) and asked.out.exists()
        before = json.loads(asked.out.read_text()) if part else {}
        contents = {**before}
        for title, verdicts in results.items():
            new = {(v.library, v.architecture): asdict(v) for v in verdicts}
            kept = before.get(title, []) if asked.only else []
            old = {(v["library"], v["architecture"]): v for v in kept}
            contents[title] = list({**old, **new}.values())
        asked.out.write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
