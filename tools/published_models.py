"""Architectures that `stochastic_depth.models.published` builds, and how to make them small."""

from collections.abc import Iterator
from typing import Any

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
