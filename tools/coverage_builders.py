"""The models of coverage_models.py, small and without trained weights, library by library.

Each entry of `BUILDERS` gives (name, build); `build()` returns a model and an example of its input.
Those of a library with an index of its models are taken from it; the others are written out in
`coverage_written`. `drawn` gives those of an index that are not tried, in a random order.
"""

import contextlib
import hashlib
import inspect
import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import coverage_written as written
import torch
from torch import nn

from stochastic_depth.models.published import inputs_of

Build = Callable[[], tuple[nn.Module, Any]]
Builders = Iterable[tuple[str, Build]]

DRAWN = {
    "transformers": 18,
    "timm": 12,
    "torchvision": 6,
    "smp": 5,
    "ultralytics": 5,
    "open_clip": 4,
}
"""How many models are drawn last, of those that no table has."""
SEED = "drawn on 2026-11-29"
ASIDE = 60
"""Types of transformers that are set aside for the draw: all others are tried."""
LARGE = 70_000_000
"""Parameters: larger ones are not tried."""
TOO_LARGE = "parameters: too large"

TU = "tu-convnext_atto tu-regnety_002 tu-res2net50_26w_4s tu-resnest14d"
"""Encoders of timm, in segmentation_models_pytorch."""

TRIED = {
    # The smallest model of each file of timm, and some.
    "timm": (
        "beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny "
        "convmixer_768_32 test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s "
        "cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_distilled_patch16_224 densenet121 "
        "dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 "
        "test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0 "
        "vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny "
        "gemma4_vit_167m ghostnet_050 hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small "
        "iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small "
        "levit_128s lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 "
        "mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny "
        "naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small test_nfnet "
        "pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 "
        "repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42 "
        "legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs "
        "swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 "
        "tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit "
        "vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 "
        "volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224 "
        "hardcorenas_a resnet26d resnet50d ecaresnet26t nf_resnet26 caformer_s18 "
        "maxvit_tiny_rw_224 mixer_s16_224 resmlp_12_224 convnextv2_atto mobilenetv2_050 "
        "mobilenetv4_conv_small "
        "eva02_tiny_patch14_224"
    ).split(),
    # One or two sizes of each.
    "torchvision": (
        "alexnet convnext_tiny convnext_small deeplabv3_mobilenet_v3_large deeplabv3_resnet50 "
        "densenet121 efficientnet_b0 efficientnet_b2 efficientnet_v2_s "
        "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn "
        "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcn_resnet50 fcos_resnet50_fpn "
        "googlenet inception_v3 keypointrcnn_resnet50_fpn lraspp_mobilenet_v3_large "
        "maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 maxvit_t mc3_18 mnasnet0_5 mobilenet_v2 "
        "mobilenet_v3_large mobilenet_v3_small mvit_v1_b mvit_v2_s r2plus1d_18 r3d_18 raft_large "
        "raft_small regnet_x_400mf regnet_x_1_6gf regnet_y_400mf regnet_y_3_2gf resnet18 "
        "resnet34 resnet50 resnet101 resnext50_32x4d retinanet_resnet50_fpn "
        "retinanet_resnet50_fpn_v2 s3d shufflenet_v2_x0_5 squeezenet1_1 ssd300_vgg16 "
        "ssdlite320_mobilenet_v3_large swin3d_t swin_t swin_s swin_v2_t vgg11 vgg11_bn vit_b_16 "
        "vit_b_32 vit_l_16 wide_resnet50_2"
    ).split(),
    "smp": [
        f"{architecture}-{encoder}"
        for architecture, encoders in {
            **dict.fromkeys(
                (
                    "UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet "
                    "Segformer"
                ).split(),
                "resnet18",
            ),
            "Unet": (
                "resnet18 resnext50_32x4d se_resnet50 efficientnet-b0 mobilenet_v2 "
                "mit_b0 xception dpn68 inceptionresnetv2 "
                "mobileone_s0 densenet121 vgg11 timm-skresnet18 inceptionv4 "
                f"{TU}"
            ),
        }.items()
        for encoder in encoders.split()
    ],
    "ultralytics": (
        "yolov3 yolov3-tiny yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-p2 yolov8n-cls "
        "yolov8n-seg yolov8n-pose yolov8n-obb yolov9t yolov9c yolov10n yolo11n yolo11n-seg "
        "yolo11n-cls yolo11n-pose yolo12n yolo12n-cls yolo26n yolo26n-cls"
    ).split(),
    "open_clip": (
        "ViT-B-32 ViT-B-32-quickgelu ViT-B-16-plus-240 ViT-B-16-SigLIP ViT-H-14-CLIPA RN50 "
        "RN50x4 ViT-H-14-worldwide coca_ViT-B-32 coca_base convnext_tiny ViT-B-16-SigLIP2 "
        "ViT-S-32-alt MobileCLIP2-S0 ViTamin-S PE-Core-T-16-384"
    ).split(),
}
"""Models that are tried, of libraries with an index of them; of transformers all types."""


def runs(model: nn.Module, example: Any) -> bool:
    """Whether the model takes the example."""
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(example, dict):
            model.eval()(**example)
        else:
            model.eval()(*example) if isinstance(example, tuple) else model.eval()(example)
    return True


def first_that_runs(model: nn.Module, examples: Iterable[Any]) -> tuple[nn.Module, Any]:
    """The model, and the first of the examples that it takes.

    Raises:
        ValueError: when it takes none; says why not the first.
    """
    reasons = []
    for example in examples:
        try:
            if runs(model, example):
                return model, example
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    raise ValueError(f"takes no example: {' | '.join(reason[:150] for reason in reasons[:3])}")


def images(*sizes: int, channels: int = 3, batch: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, channels, size, size) for size in sizes]


def of_meta_size(build: Callable[[], nn.Module]) -> int:
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build().parameters())
    except Exception:
        return 0  # cannot be built there


def small(build: Callable[[], nn.Module]) -> nn.Module:
    size = of_meta_size(build)
    if size > LARGE:
        raise ValueError(f"{size} {TOO_LARGE}")
    return build()


def timm() -> Builders:
    import timm

    def build(name: str) -> tuple[nn.Module, Any]:
        for options in (
            {"depth": 4, "img_size": 64},
            {"depths": (1, 1, 2, 1), "img_size": 64},
            {"img_size": 64},
            {"depth": 4},
        ):
            with contextlib.suppress(Exception):  # not every model has them
                model = small(lambda options=options: timm.create_model(name, **options))
                return first_that_runs(model, images(64))
        model = small(lambda: timm.create_model(name))
        native = max(getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:])
        return first_that_runs(model, images(64, 96, 128, native))

    return [(name, partial(build, name)) for name in timm.list_models()]


def of_scores(boxes: torch.Tensor, scores: torch.Tensor, least: float) -> torch.Tensor:
    """In place of non-maximum suppression: the eight best boxes."""
    return scores.argsort(descending=True)[:8]


def torchvision() -> Builders:
    import torchvision
    from torchvision import models

    detection, video = (
        models.list_models(module=models.detection),
        models.list_models(module=models.video),
    )

    if torch.version.cuda is None:  # boxes are chosen by an operator that is not there
        torchvision.ops.boxes._assert_has_ops = lambda: None
        torchvision.ops.boxes.torch.ops.torchvision.nms = of_scores

    whole = models.video.mvit._mvit  # of 16 frames of 224 x 224, which take minutes
    size = {"spatial_size": (64, 64), "temporal_size": 8}
    models.video.mvit._mvit = lambda *args, **options: whole(*args, **{**options, **size})

    def build(name: str) -> tuple[nn.Module, Any]:
        make = models.get_model_builder(name)
        known = inspect.signature(make).parameters
        options: dict[str, Any] = {"weights_backbone": None} if "weights_backbone" in known else {}
        if name.startswith("vit_"):
            hidden, heads, mlp = {"b": (768, 12, 3072), "l": (1024, 16, 4096)}.get(
                name.split("_")[1], (1280, 16, 5120)
            )
            patch = int(name.split("_")[2])
            return models.VisionTransformer(2 * patch, patch, 2, heads, hidden, mlp), torch.randn(
                2, 3, 2 * patch, 2 * patch
            )
        if name in detection and "ssd" not in name:
            options |= {"min_size": 64, "max_size": 64}
        if "rcnn" in name:  # regions of interest are slow without the compiled operator
            few = "box_detections_per_img rpn_post_nms_top_n_test rpn_post_nms_top_n_train"
            options |= dict.fromkeys([*few.split(), "box_batch_size_per_image"], 4)
        model = small(lambda: make(weights=None, **options))
        if name in detection:
            boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
            target = {"boxes": boxes, "labels": torch.ones(1, dtype=torch.int64)}
            target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
            target["keypoints"] = torch.full((1, 17, 3), 20.0)
            return model, (list(torch.randn(2, 3, 64, 64)), [target] * 2)
        if name in video:
            return first_that_runs(
                model, [torch.randn(2, 3, 8, 64, 64), torch.randn(1, 3, 16, 224, 224)]
            )
        if name.startswith("raft"):
            return model, (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128), 2)
        return first_that_runs(model, images(64, 96, 224, 299))

    return [(name, partial(build, name)) for name in models.list_models()]


# Configurations of transformers, made small.

DEPTH = re.compile(
    r"(^|_)(num_)?(hidden_)?(layers?|blocks|depth)$|^n_layers?$|_n_layers$|^num_hidden_layers"
)
HEADS = re.compile(r"(^|_)n?_?heads?$|heads")
SIZE = re.compile(
    r"hidden_size|d_model|n_embd|(^|_)dim$|embed_dim|embedding_size|hidden_dim|_size$|_dim$|"
    r"^width$|channels$|num_filters$|n_positions"
)
INNER = re.compile(r"intermediate|ffn|d_ff|n_inner|mlp_dim|d_inner|feed_forward|inner_dim")
FIXED: dict[str, int] = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_num_experts": 4, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "n_shared_experts": 1, "image_size": 32, "patch_size": 8, "window_size": 4, "head_dim": 8,
    "d_kv": 8, "d_head": 8, "attention_head_size": 8, "attention_head_dim": 8, "global_head_dim": 8,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "rotary_dim": 4, "max_position_embeddings": 64,
    "n_positions": 64, "n_ctx": 64, "max_source_positions": 40, "max_target_positions": 64,
    "mamba_d_state": 4, "state_size": 8, "ssm_state_size": 8, "chunk_size": 4,
    "mamba_chunk_size": 4,
    "num_mel_bins": 16, "num_queries": 5, "num_key_value_heads": 2, "multi_query_group_num": 2,
    "num_kv_heads": 2, "lru_width": 32, "attention_window": 4, "num_landmarks": 3,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4,
    "temporal_patch_size": 2, "spatial_merge_size": 1, "conv_kernel": 4, "conv_kernel_size": 3,
    "depthwise_conv_kernel_size": 3, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "n_groups": 1, "mamba_n_groups": 1, "num_hash_buckets": 50,
    "num_codevectors_per_group": 8, "codevector_dim": 16, "num_frames": 2, "tubelet_size": 2,
    "frames_per_clip": 2, "crop_size": 32,
}  # fmt: skip
KEPT = re.compile(
    r"num_labels|num_channels|in_channels|type_vocab|kernel|stride|pool|group|freq|feat_extract"
)
ALWAYS = {"num_kv_shared_layers": 0, "upsample_groups": 4, "apply_spec_augment": False}
"""Fields that are so in every small configuration."""
THREE = re.compile("vl|glm4v_text|glm_image_text|omni|cosmos3_edge")
"""Types whose rotary embeddings have three parts."""
UNSET = {"head_dim": 8, "vocab_size": 128}
"""Fields that have no value by default, and must."""


def shrunk(config: Any, halves: int) -> dict[str, Any]:
    """Fields of a small configuration of the same type.

    Args:
        halves: 0 gives every field a size of ours; else sizes are divided by so much, and only
            depth and vocabulary are ours.
    """
    fields: dict[str, Any] = {}
    for key, value in vars(config).items():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            fields[key] = {"model_type": value.model_type, **shrunk(value, halves)}
        elif key in ALWAYS or (value is None and key in UNSET):
            fields[key] = ALWAYS.get(key, UNSET.get(key))
        elif key == "rope_parameters" and THREE.search(config.model_type) and not halves:
            fields[key] = {**(value or {}), "mrope_section": [1, 1, 2]}
        elif key == "vocab_size" and isinstance(value, int):
            fields[key] = 128
        elif re.search(r"token_(id|index)$", key) and isinstance(value, int) and value > 99:
            fields[key] = 100 + int(hashlib.sha256(key.encode()).hexdigest(), 16) % 28
        elif isinstance(value, bool) or KEPT.search(key):
            continue
        elif isinstance(value, int) and DEPTH.search(key):
            fields[key] = min(value, 2)
        elif isinstance(value, int) and halves and value >= 64:
            fields[key] = value // halves if SIZE.search(key) or INNER.search(key) else value
        elif isinstance(value, int) and not halves:
            if key in FIXED:
                fields[key] = FIXED[key]
            elif HEADS.search(key):
                fields[key] = min(value, 4)
            elif INNER.search(key):
                fields[key] = min(value, 64)
            elif SIZE.search(key):
                fields[key] = min(value, 32)
        elif isinstance(value, list) and value and all(isinstance(v, int) for v in value):
            if key in ("depths", "layer_depths", "depth", "num_blocks", "encoder_blocks"):
                fields[key] = [min(v, 1 + (n == len(value) // 2)) for n, v in enumerate(value)]
            elif not halves and key in ("hidden_sizes", "embed_dims", "encoder_hidden_sizes"):
                fields[key] = [16 * 2 ** min(n, 2) for n in range(len(value))]
            elif not halves and key == "mrope_section":
                fields[key] = [1, 1, 2]
    if fields.get("layer_types") is None:
        fields.pop("layer_types", None)
    return fields


BACKBONE = {
    "backbone": None,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone_config": {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 2, 1], "layer_type": "basic", "out_features": ["stage4"],
    },
}  # fmt: skip
SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2],
          "num_time_features": 1, "d_model": 32}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0],
           "partial_rotary_factor": 0.5}  # fmt: skip
HIERA = {"hidden_size": 16, "image_size": [64, 64], "blocks_per_stage": [1, 2, 2, 1],
         "embed_dim_per_stage": [16, 32, 64, 128], "window_size_per_stage": [4, 4, 4, 4],
         "global_attention_blocks": [4],
         "window_positional_embedding_background_size": [4, 4]}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "sam": {
        "vision_config": {"model_type": "sam_vision_model", "hidden_size": 32, "mlp_dim": 64,
                          "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "image_size": 128, "window_size": 4, "num_pos_feats": 16,
                          "global_attn_indexes": [1]},
        "prompt_encoder_config": {"model_type": "sam_prompt_encoder", "hidden_size": 32,
                                  "image_size": 128, "image_embedding_size": 8},
        "mask_decoder_config": {"model_type": "sam_mask_decoder", "hidden_size": 32, "mlp_dim": 64,
                                "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    },
    "sam2_hiera_det_model": HIERA,
    "mobilevitv2": {"width_multiplier": 0.5, "image_size": 64},
    "detr": BACKBONE,
    "conditional_detr": BACKBONE,
    "dab-detr": BACKBONE,
    "deformable_detr": {**BACKBONE, "num_feature_levels": 1},
    "table-transformer": BACKBONE,
    "autoformer": {**SERIES, "label_length": 4},
    "informer": SERIES,
    "time_series_transformer": SERIES,
    "glm4v_moe_text": {"rope_parameters": PARTIAL},
    "esm": {"pad_token_id": 1, "mask_token_id": 2},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "bloom": {"n_layer": 2},
    "mamba2": {"num_heads": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "mamba"],
               "num_mem_blocks": 1},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "xlnet": {"d_model": 32, "n_head": 2, "d_head": 16},
    "funnel": {"d_model": 32, "n_head": 2, "d_head": 16, "block_sizes": [1, 1],
               "block_repeats": [1, 1], "num_decoder_layers": 1},
    "wav2vec2": {"apply_spec_augment": False},
    "hubert": {"apply_spec_augment": False},
    "big_bird": {"attention_type": "original_full"},
    "swin2sr": {"image_size": 16, "patch_size": 1, "embed_dim": 24, "depths": [2, 2],
                "num_heads": [2, 2], "window_size": 4},
    "efficientnet": {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.5,
                     "hidden_dim": 640},
    "sam2": {
        "vision_config": {
            "model_type": "sam2_vision_model", "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
            "backbone_config": {"model_type": "sam2_hiera_det_model", **HIERA},
        },
        "prompt_encoder_config": {"model_type": "sam2_prompt_encoder", "hidden_size": 32,
                                  "image_size": 64, "patch_size": 16, "mask_input_channels": 16},
        "mask_decoder_config": {"model_type": "sam2_mask_decoder", "hidden_size": 32,
                                "mlp_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                                "iou_head_depth": 2, "iou_head_hidden_dim": 32},
    },
    "sam3_tracker": {
        "vision_config": {
            "model_type": "sam3_vision_model", "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "backbone_config": {
                "model_type": "sam3_vit_model", "hidden_size": 32, "intermediate_size": 64,
                "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 112,
                "patch_size": 14, "window_size": 4, "global_attn_indexes": [1],
                "pretrain_image_size": 56,
            },
        },
        "prompt_encoder_config": {"model_type": "sam3_tracker_prompt_encoder", "hidden_size": 32,
                                  "image_size": 112, "mask_input_channels": 16},
        "mask_decoder_config": {"model_type": "sam3_tracker_mask_decoder", "hidden_size": 32,
                                "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    },
    "swin": {"image_size": 64, "patch_size": 2, "embed_dim": 12, "depths": [2, 2]},
    "swinv2": {"image_size": 64, "patch_size": 2, "embed_dim": 12, "depths": [2, 2]},
}  # fmt: skip


def texts(model: Any) -> Iterator[dict[str, Any]]:
    """Examples to try with a model of transformers."""
    config = model.config
    known = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    cache = {"use_cache": False} if "use_cache" in known or open_ended else {}
    parts = [config, *(v for v in vars(config).values() if hasattr(v, "model_type"))]

    def get(name: str, default: int) -> Any:
        values = [getattr(part, name, None) for part in parts]
        return next((v for v in values if isinstance(v, int)), default)

    ids = torch.randint(5, 90, (2, 16))
    if "duration_labels" in known:  # without which FastSpeech 2 does not train
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "duration_labels": torch.full((2, 16), 2),
            "pitch_labels": torch.randn(2, 16, 1),
            "energy_labels": torch.randn(2, 16, 1),
            "spectrogram_labels": torch.randn(2, 32, get("num_mel_bins", 80)),
        }
    with contextlib.suppress(Exception):
        yield inputs_of(model, 2, None, "cpu")
    size = get("image_size", 64)
    pixels = torch.randn(2, get("num_channels", 3), size, size)
    decoder = {"decoder_input_ids": ids} if "decoder_input_ids" in known else {}
    bins, frames = get("num_mel_bins", 80), 2 * get("max_source_positions", 40)
    candidates: list[dict[str, Any]] = [
        {"input_ids": ids, **decoder},
        {"input_ids": ids, "bbox": torch.randint(0, 99, (2, 16, 2)).sort().values.repeat(1, 1, 2)},
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder},
        {"pixel_values": pixels},
        {"pixel_values": torch.randn(2, get("num_channels", 3), 64, 64)},
        {"pixel_values": torch.randn(2, 3, 224, 224)},
        {"pixel_values": pixels, "input_ids": ids, **decoder},
        {"pixel_values": pixels, **decoder},
        {"pixel_values": torch.randn(2, get("num_frames", 2), 3, size, size)},
        {"pixel_values_videos": torch.randn(2, get("frames_per_clip", 2), 3, size, size)},
        {"input_values": torch.randn(2, 2000), **decoder},
        {"input_values": torch.randn(2, 1, 1024)},
        {"input_values": torch.randn(2, get("max_length", 64), bins)},
        {"input_features": torch.randn(2, bins, frames), **decoder},
        {"input_features": torch.randn(2, 40, bins), **decoder},
        {"input_features": torch.randn(2, 40, get("feature_projection_input_dim", 80))},
        {"input_features": torch.randn(2, bins, 64), "attention_mask": torch.ones(2, 64).long()},
        {"inputs_embeds": torch.randn(2, 16, get("hidden_size", 32))},
        {"hidden_states": torch.randn(2, 16, get("hidden_size", 32))},
        {"past_values": torch.randn(2, get("context_length", 32), get("num_input_channels", 1))},
        {
            "hidden_states": torch.randn(16, 3 * 2 * get("patch_size", 8) ** 2),
            "grid_thw": torch.tensor([[1, 4, 4]]),
        },
    ]
    first = next(iter(known), "")
    patch, dim = get("patch_size", 8), get("hidden_size", get("d_model", 32))
    for grid, times in itertools.product(("grid_thw", "image_grid_thw"), (2, 1)):
        flat = torch.randn(16, 3 * times * patch**2)
        candidates.append({first: flat, grid: torch.tensor([[1, 4, 4]])})
    for mask in ("input_features_mask", "attention_mask"):
        for shape in ((2, bins, 64), (2, 64, bins)):
            ones = torch.ones(2, 64, dtype=torch.bool)
            candidates.append({"input_features": torch.randn(shape), mask: ones})
    window = 16 + 2  # and the largest lag
    past, future = torch.randn(2, window), torch.randn(2, 8)
    candidates += [
        {
            "pixel_values": torch.randn(2, 16, 3 * patch**2),
            "pixel_attention_mask": torch.ones(2, 16),
            "spatial_shapes": torch.tensor([[4, 4]] * 2),
            **({"input_ids": ids} if "input_ids" in known else {}),
        },
        {
            "pixel_values": torch.randn(2, 16, 3 * patch**2),
            "pixel_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(
                2, 1, 1
            ),
        },
        {
            "past_values": past,
            "past_time_features": torch.randn(2, window, 1),
            "past_observed_mask": torch.ones(2, window),
            "future_values": future,
            "future_time_features": torch.randn(2, 8, 1),
        },
        {"input_ids": ids, "input_features": torch.randn(2, 1, 1001, bins)},
        {"input_ids": ids, "input_features": torch.randn(2, bins, 64)},
        {"input_ids": ids, "input_values": torch.randn(2, 1, 8000)},
        {
            "input_ids": ids,
            "visual_feats": torch.randn(2, 5, get("visual_feat_dim", 32)),
            "visual_pos": torch.randn(2, 5, 4),
        },
        {"pixel_values": pixels, "input_ids": ids, "qformer_input_ids": ids},
        {
            "states": torch.randn(2, 6, get("state_dim", 17)),
            "actions": torch.randn(2, 6, get("act_dim", 4)),
            "rewards": torch.randn(2, 6, 1),
            "returns_to_go": torch.randn(2, 6, 1),
            "timesteps": torch.arange(6).repeat(2, 1),
            "attention_mask": torch.ones(2, 6),
        },
        {
            "pixel_values": pixels,
            "prompt_pixel_values": pixels,
            "prompt_masks": pixels,
        },
        {"query_embeds": torch.randn(2, 5, dim), "encoder_hidden_states": torch.randn(2, 7, dim)},
        {"query_embeds": torch.randn(2, 5, dim)},
        {"hidden_states": torch.randn(2, dim, 16)},
        {"input_values": torch.randn(2, 1, 8000)},
        {"pixel_values": torch.randn(2, 3, 128, 128)},
        {"pixel_values": torch.randn(2, 3, 256, 256)},
    ]
    for candidate in candidates:
        if all(name in known for name in candidate):
            yield {**candidate, **cache}
            if cache and "use_cache" not in known:
                yield candidate


def _transformers(name: str) -> tuple[nn.Module, Any]:
    import transformers

    default = transformers.AutoConfig.for_model(name)
    reasons = []
    for halves in (0, 8, 16, 4, 1):
        fields = {**shrunk(default, halves), **OWN.get(name, {})}
        try:
            config = transformers.AutoConfig.for_model(name, **fields)
            for part in [config, *vars(config).values()]:
                if hasattr(part, "use_cache"):
                    part.use_cache = False
            model = small(lambda config=config: transformers.AutoModel.from_config(config))
            return first_that_runs(model, texts(model))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}"[:200])
    raise ValueError(" || ".join(reasons[:2]))


def transformers() -> Builders:
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return [(name, partial(_transformers, name)) for name in MODEL_MAPPING_NAMES]


def smp() -> Builders:
    import segmentation_models_pytorch as smp

    def build(architecture: str, encoder: str) -> tuple[nn.Module, Any]:
        model = small(lambda: getattr(smp, architecture)(encoder, encoder_weights=None))
        return first_that_runs(model, images(64, 96, 128))

    architectures = (
        "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"
    ).split()
    pairs = [
        (a, e) for a in architectures for e in [*smp.encoders.get_encoder_names(), *TU.split()]
    ]
    return [(f"{a}-{e}", partial(build, a, e)) for a, e in pairs]


def ultralytics() -> Builders:
    from ultralytics.nn import tasks

    def build(name: str) -> tuple[nn.Module, Any]:
        kinds = {"cls": "Classification", "seg": "Segmentation", "pose": "Pose", "obb": "OBB"}
        kind = next((kinds[k] for k in kinds if f"-{k}" in name), "Detection")
        model = getattr(tasks, f"{kind}Model")(f"{name}.yaml", verbose=False)
        return first_that_runs(model, images(64))

    folder = Path(tasks.__file__).parents[1] / "cfg" / "models"
    files = sorted(folder.rglob("*.yaml"))
    names = [of_size(file.stem) for file in files if not KINDLESS.search(file.stem)]
    return [(name, partial(build, name)) for name in dict.fromkeys(names)]


KINDLESS = re.compile(r"rtdetr|world|yoloe|resnet|sam")
"""Files of ultralytics whose models are of another class, or take texts."""


def of_size(name: str) -> str:
    """The smallest size of a file of ultralytics: yolo11n of yolo11."""
    found = re.match(r"(yolo(?:v5|v6|v8|v10|11|12|26))(-.*)?$", name)
    return f"{found[1]}n{found[2] or ''}" if found else name


def open_clip() -> Builders:
    import open_clip

    def build(name: str) -> tuple[nn.Module, Any]:
        config = open_clip.get_model_config(name)
        vision, text = config["vision_cfg"], config["text_cfg"]
        if isinstance(vision.get("layers"), list):
            vision |= {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
        elif "timm_model_name" not in vision:
            vision |= {"layers": 2, "width": 64, "head_width": 16, "image_size": 32}
            vision |= {"patch_size": 8}
        text |= {"context_length": 16, "vocab_size": 99, "width": 64, "heads": 4, "layers": 2}
        text.pop("hf_tokenizer_name", None)
        if "multimodal_cfg" in config:
            config["multimodal_cfg"] |= {"context_length": 16, "vocab_size": 99, "width": 64}
            config["multimodal_cfg"] |= {"heads": 4, "layers": 2}
        config["embed_dim"] = 64
        is_custom = config.pop("custom_text", False)
        kind = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
        if "multimodal_cfg" in config:
            kind = open_clip.CoCa
        model = small(lambda: kind(**config))
        size = vision["image_size"]
        size = size if isinstance(size, int) else size[0]
        return first_that_runs(
            model, [(x, torch.randint(1, 99, (2, 16))) for x in images(size, 224, 256)]
        )

    return [(name, partial(build, name)) for name in open_clip.list_models()]


EARLIER = (
    "resnet18 resnet50 gpt2 gpt_neo gpt_neox gptj opt bloom falcon llama mistral qwen2 qwen3 "
    "gemma gemma2 phi phi3 olmo2 cohere starcoder2 granite mixtral bert roberta electra "
    "distilbert albert deberta-v2 mpnet t5 mt5 bart pegasus whisper wav2vec2 hubert vit deit "
    "dinov2 beit swin swinv2 convnext convnextv2 resnet segformer clip_vision_model "
    "siglip_vision_model mamba mamba2 jamba gpt_oss gpt_bigcode qwen2_moe deepseek_v3 "
    "squeezebert xlnet funnel longformer rwkv codegen mobilebert roformer nystromformer fnet "
    "esm luke ctrl openai-gpt nemotron olmoe cohere2 gemma3_text glm stablelm persimmon zamba2 "
    "bamba mpt dbrx xglm biogpt data2vec-text big_bird ibert convbert deberta canine splinter "
    "megatron-bert rembert xlm flaubert recurrent_gemma falcon_mamba modernbert diffllama "
    "smollm3 ernie4_5 exaone4 helium phimoe granitemoe lfm2 hunyuan_v1_dense arcee minimax "
    "dinov3_vit dinov2_with_registers ijepa vit_mae vit_msn yolos poolformer pvt cvt levit "
    "mobilevit mobilevitv2 regnet bit efficientnet focalnet dinat data2vec-vision hiera "
    "swiftformer van glpn vitdet eurobert mellum lxmert wavlm fun_asr_nano_encoder "
    "gemma4_vision deepseek_ocr2"
).split()
"""Types that were looked at before any was set aside."""


def _aside() -> list[str]:
    """The types of transformers that are set aside: the first by the hash of their name."""
    names = sorted(name for name, _ in transformers() if name not in EARLIER)
    return sorted(names, key=lambda name: _key("transformers", name))[:ASIDE]


def _key(library: str, name: str) -> str:
    return hashlib.sha256(f"coverage/{library}/{name}".encode()).hexdigest()


def _table(library: str) -> list[tuple[str, Build]]:
    """The models of a library that are tried, of its index."""
    known = dict(INDEXED[library]())
    if library == "transformers":
        aside = _aside()
        return [(name, build) for name, build in known.items() if name not in aside]
    return [(name, known[name]) for name in TRIED[library] if name in known]


def drawn(library: str) -> Builders:
    """Those of its index that are not tried, in a random order."""
    tried = {name for name, _ in _table(library)}
    rest = [(name, build) for name, build in INDEXED[library]() if name not in tried]
    random.Random(f"{SEED}, {library}").shuffle(rest)
    return rest


def not_tried(library: str) -> str:
    """The names of those, but for what segmentation_models_pytorch combines."""
    if library not in INDEXED or library == "smp":
        return ""
    tried = {name for name, _ in _table(library)}
    return " ".join(name for name, _ in INDEXED[library]() if name not in tried)


INDEXED: dict[str, Callable[[], Builders]] = {
    "timm": timm,
    "torchvision": torchvision,
    "transformers": transformers,
    "smp": smp,
    "ultralytics": ultralytics,
    "open_clip": open_clip,
}
BUILDERS: dict[str, Callable[[], Builders]] = {
    **{name: partial(_table, name) for name in INDEXED},
    **written.BUILDERS,
}
