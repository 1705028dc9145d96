"""Models of libraries without an index of them, written out small: see coverage_builders."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn, randn
from torch.nn import functional

Table = dict[str, Callable[[], tuple[nn.Module, Any]]]
"""Models by name: each gives itself, and an example of its input."""


# A model is two or three lines here, and would be twenty.
# fmt: off


def vit_pytorch() -> Table:
    import vit_pytorch as v
    from vit_pytorch import (
        cait,
        cct,
        crossformer,
        cvt,
        deepvit,
        levit,
        look_vit,
        max_vit,
        mobile_vit,
        nest,
        parallel_vit,
        pit,
        regionvit,
        scalable_vit,
        sep_vit,
        t2t,
        twins_svt,
        vit_3d,
        vit_for_small_dataset,
        vivit,
        xcit,
    )
    from vit_pytorch import cross_vit as crossvit

    image = randn(2, 3, 64, 64)
    k = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 32, "depth": 2, "heads": 2,
        "mlp_dim": 64}
    others = (
        "learnable_memory_vit.ViT vit_with_patch_merger.ViT normalized_vit.nViT "
        "simple_flash_attn_vit.SimpleViT simple_uvit.SimpleUViT "
        "simple_vit_with_qk_norm.SimpleViT simple_vit_with_register_tokens.SimpleViT rvt.RvT "
        "simple_vit_with_value_residual.SimpleViT "
        "vit_with_keel_post_ln.ViT vit_with_decorr.ViT "
        "simple_vit_with_patch_dropout.SimpleViT vit_with_patch_dropout.ViT"
    ).split()

    def simple(file: str, kind: str) -> tuple[nn.Module, Any]:
        return getattr(import_module(f"vit_pytorch.{file}"), kind)(**k), image

    return {
        "ViT": lambda: (v.ViT(**k), image),
        "SimpleViT": lambda: (v.SimpleViT(**k), image),
        "DeepViT": lambda: (deepvit.DeepViT(**k), image),
        "CaiT": lambda: (cait.CaiT(**k, cls_depth=1), image),
        "CCT": lambda: (cct.cct_2(img_size=64, num_classes=10), image),
        "T2T": lambda: (t2t.T2TViT(dim=32, image_size=64, depth=2, heads=2, mlp_dim=64,
            num_classes=10, t2t_layers=((7, 4), (3, 2))), image),
        "PiT": lambda: (pit.PiT(image_size=64, patch_size=16, dim=32, num_classes=10, depth=(2, 2),
            heads=2, mlp_dim=64), image),
        "LeViT": lambda: (levit.LeViT(image_size=64, num_classes=10, stages=2, dim=(32, 48),
            depth=2, heads=(2, 3), mlp_mult=2), image),
        "CvT": lambda: (cvt.CvT(num_classes=10, s1_emb_dim=16, s1_depth=1, s2_emb_dim=32,
            s2_depth=1, s3_emb_dim=48, s3_depth=2, s3_heads=2, s2_heads=2), image),
        "TwinsSVT": lambda: (twins_svt.TwinsSVT(num_classes=10, **{f"s{n}_{key}": value
            for n in (1, 2, 3, 4) for key, value in {"emb_dim": 16, "depth": 1,
            "local_patch_size": 2, "global_k": 2}.items()}), randn(2, 3, 128, 128)),
        "RegionViT": lambda: (regionvit.RegionViT(dim=(16, 32, 48, 64), depth=(1, 1, 2, 1),
            window_size=7, num_classes=10), randn(1, 3, 224, 224)),
        "CrossFormer": lambda: (crossformer.CrossFormer(num_classes=10, dim=(32, 32, 64, 64),
            depth=(1, 1, 2, 1), global_window_size=(8, 4, 2, 1), local_window_size=7),
            randn(1, 3, 224, 224)),
        "ScalableViT": lambda: (scalable_vit.ScalableViT(num_classes=10, dim=16, heads=(1, 2, 2, 4),
            depth=(1, 1, 2, 1), ssa_dim_key=(8, 8, 8, 8), reduction_factor=(8, 4, 2, 1),
            window_size=(64, 32, None, None)), randn(1, 3, 256, 256)),
        "SepViT": lambda: (sep_vit.SepViT(num_classes=10, dim=16, dim_head=8, heads=(1, 2, 2, 2),
            depth=(1, 1, 2, 1), window_size=7), randn(1, 3, 224, 224)),
        "MaxViT": lambda: (max_vit.MaxViT(num_classes=10, dim_conv_stem=16, dim=16, dim_head=8,
            depth=(1, 1), window_size=4), randn(1, 3, 64, 64)),
        "NesT": lambda: (nest.NesT(image_size=64, patch_size=4, dim=16, heads=2, num_hierarchies=3,
            block_repeats=(1, 1, 2), num_classes=10), image),
        "MobileViT": lambda: (mobile_vit.MobileViT(image_size=(64, 64), dims=[32, 48, 64],
            channels=[16, 16, 16, 16, 24, 24, 32, 32, 48, 48, 64], num_classes=10), image),
        "XCiT": lambda: (xcit.XCiT(**k, cls_depth=1, local_patch_kernel_size=3), image),
        "ParallelViT": lambda: (parallel_vit.ViT(**k, num_parallel_branches=2), image),
        "CrossViT": lambda: (crossvit.CrossViT(image_size=64, num_classes=10, depth=1, sm_dim=32,
            lg_dim=48, sm_patch_size=8, lg_patch_size=16, sm_enc_depth=1, lg_enc_depth=2,
            sm_enc_heads=2, lg_enc_heads=2, sm_enc_mlp_dim=32, lg_enc_mlp_dim=32,
            cross_attn_depth=1, cross_attn_heads=2), image),
        "SmallDataset": lambda: (vit_for_small_dataset.ViT(**k), image),
        "LookViT": lambda: (look_vit.LookViT(image_size=64, num_classes=10, dim=32, depth=2,
            patch_size=16, heads=2, mlp_factor=2, dim_head=8, highres_patch_size=8,
            highres_mlp_factor=2, cross_attn_heads=2, cross_attn_dim_head=8,
            patch_conv_kernel_size=3), image),
        "ViT3D": lambda: (vit_3d.ViT(image_size=32, image_patch_size=16, frames=4,
            frame_patch_size=2, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64),
            randn(2, 3, 4, 32, 32)),
        "ViViT": lambda: (vivit.ViViT(image_size=32, image_patch_size=16, frames=4,
            frame_patch_size=2, num_classes=10, dim=32, spatial_depth=2, temporal_depth=2, heads=2,
            mlp_dim=64), randn(2, 3, 4, 32, 32)),
        **{name.split(".")[0]: partial(simple, *name.split(".")) for name in others},
    }


def x_transformers() -> Table:
    from x_transformers import (
        ContinuousTransformerWrapper,
        Decoder,
        Encoder,
        TransformerWrapper,
        ViTransformerWrapper,
        XTransformer,
    )

    T = torch.randint(0, 99, (2, 12))

    def decoder(**options: Any) -> tuple[nn.Module, Any]:
        layers = Decoder(dim=32, depth=3, heads=2, attn_dim_head=16, **options)
        return TransformerWrapper(num_tokens=99, max_seq_len=16, attn_layers=layers), T

    options = {
        "plain": {}, "rotary": {"rotary_pos_emb": True}, "alibi": {"alibi_pos_bias": True},
        "t5": {"rel_pos_bias": True}, "glu": {"ff_glu": True, "ff_swish": True},
        "rms": {"use_rmsnorm": True}, "sandwich": {"sandwich_norm": True},
        "qknorm": {"attn_qk_norm": True}, "post": {"pre_norm": False},
        "gate": {"gate_residual": True}, "scale": {"use_scalenorm": True},
        "shift": {"shift_tokens": 1}, "kv": {"attn_kv_heads": 1}, "macaron": {"macaron": True},
    }
    return {
        **{name: partial(decoder, **each) for name, each in options.items()},
        "encoder": lambda: (TransformerWrapper(num_tokens=99, max_seq_len=16,
            attn_layers=Encoder(dim=32, depth=3, heads=2)), T),
        "continuous": lambda: (ContinuousTransformerWrapper(dim_in=8, dim_out=8, max_seq_len=16,
            attn_layers=Encoder(dim=32, depth=3, heads=2)), randn(2, 12, 8)),
        "encdec": lambda: (XTransformer(dim=32, enc_num_tokens=99, enc_depth=2, enc_heads=2,
            enc_max_seq_len=16, dec_num_tokens=99, dec_depth=2, dec_heads=2, dec_max_seq_len=16),
            (T, T)),
        "vit": lambda: (ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10,
            attn_layers=Encoder(dim=32, depth=3, heads=2)), randn(2, 3, 32, 32)),
    }


def diffusers() -> Table:
    import diffusers as d

    t = torch.tensor([1, 2])
    return {
        "DiT": lambda: (d.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16,
            in_channels=4, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=10),
            {"hidden_states": randn(2, 4, 8, 8), "timestep": t, "class_labels": t.clone()}),
        "UNet2D": lambda: (d.UNet2DModel(sample_size=16, block_out_channels=(32, 64),
            layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), norm_num_groups=8), (randn(2, 3, 16, 16),
            t)),
        "UNet2DCondition": lambda: (d.UNet2DConditionModel(sample_size=16,
            block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D",
            "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8),
            (randn(2, 4, 16, 16), t, randn(2, 5, 32))),
        "PixArt": lambda: (d.PixArtTransformer2DModel(num_attention_heads=2, attention_head_dim=16,
            num_layers=2, sample_size=8, caption_channels=16, cross_attention_dim=32),
            {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 16),
            "timestep": t, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
        "Flux": lambda: (d.FluxTransformer2DModel(in_channels=4, num_layers=2, num_single_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=16, axes_dims_rope=(4, 4, 8)), {"hidden_states": randn(2, 16, 4),
            "encoder_hidden_states": randn(2, 5, 32), "pooled_projections": randn(2, 16),
            "timestep": t.float(), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}),
        "SD3": lambda: (d.SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4,
            num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            caption_projection_dim=32, pooled_projection_dim=16, out_channels=4),
            {"hidden_states": randn(2, 4, 8, 8), "encoder_hidden_states": randn(2, 5, 32),
            "pooled_projections": randn(2, 16), "timestep": t}),
        "AutoencoderKL": lambda: (d.AutoencoderKL(block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8), randn(2, 3, 16, 16)),
        "VQModel": lambda: (d.VQModel(block_out_channels=(32,), norm_num_groups=8),
            randn(2, 3, 16, 16)),
        "Transformer2D": lambda: (d.Transformer2DModel(num_attention_heads=2, attention_head_dim=16,
            in_channels=32, num_layers=2, norm_num_groups=8), randn(2, 32, 8, 8)),
        "Hunyuan": lambda: (d.HunyuanDiT2DModel(num_attention_heads=2, attention_head_dim=16,
            in_channels=4, patch_size=2, sample_size=8, hidden_size=32, num_layers=2,
            cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, text_len=5,
            text_len_t5=5), {"hidden_states": randn(2, 4, 8, 8), "timestep": t.float(),
            "encoder_hidden_states": randn(2, 5, 32), "text_embedding_mask": torch.ones(2, 5),
            "encoder_hidden_states_t5": randn(2, 5, 32), "style": torch.zeros(2).long(),
            "text_embedding_mask_t5": torch.ones(2, 5), "image_meta_size": torch.ones(2, 6),
            "image_rotary_emb": (randn(16, 16), randn(16, 16))}),
        "Sana": lambda: (d.SanaTransformer2DModel(in_channels=4, out_channels=4,
            num_attention_heads=2, attention_head_dim=16, num_layers=2, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16, sample_size=8,
            patch_size=1), {"hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 5, 16), "timestep": t}),
        "CogVideoX": lambda: (d.CogVideoXTransformer3DModel(num_attention_heads=2,
            attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
            max_text_seq_length=5), {"hidden_states": randn(2, 3, 4, 8, 8),
            "encoder_hidden_states": randn(2, 5, 16), "timestep": t}),
        "Latte": lambda: (d.LatteTransformer3DModel(sample_size=8, num_layers=2, patch_size=2,
            attention_head_dim=16, num_attention_heads=2, caption_channels=16, in_channels=4,
            cross_attention_dim=32, out_channels=8, attention_bias=True, video_length=1,
            activation_fn="gelu-approximate", norm_type="ada_norm_single",
            norm_elementwise_affine=False, num_embeds_ada_norm=10),
            {"hidden_states": randn(2, 4, 1, 8, 8), "encoder_hidden_states": randn(2, 5, 16),
            "timestep": t}),
        "Wan": lambda: (d.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2,
            attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
            ffn_dim=32, num_layers=2), {"hidden_states": randn(2, 4, 2, 8, 8),
            "encoder_hidden_states": randn(2, 5, 16), "timestep": t}),
        "LTX": lambda: (d.LTXVideoTransformer3DModel(in_channels=4, out_channels=4,
            num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
            caption_channels=16), {"hidden_states": randn(2, 8, 4),
            "encoder_hidden_states": randn(2, 5, 16), "timestep": t,
            "encoder_attention_mask": torch.ones(2, 5).bool(), "num_frames": 2, "height": 2,
            "width": 2}),
        "AuraFlow": lambda: (d.AuraFlowTransformer2DModel(sample_size=8, patch_size=2,
            in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
            out_channels=4, pos_embed_max_size=64), {"hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 5, 32), "timestep": t.float()}),
        "Prior": lambda: (d.PriorTransformer(num_attention_heads=2, attention_head_dim=16,
            num_layers=2, embedding_dim=16, num_embeddings=5, additional_embeddings=4),
            {"hidden_states": randn(2, 16), "timestep": t, "proj_embedding": randn(2, 16),
            "encoder_hidden_states": randn(2, 5, 16)}),
        "UNet3D": lambda: (d.UNet3DConditionModel(sample_size=8, block_out_channels=(32, 64),
            layers_per_block=1, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=32,
            attention_head_dim=8, norm_num_groups=8), (randn(1, 4, 3, 8, 8), t[:1],
            randn(1, 5, 32))),
        "UNet1D": lambda: (d.UNet1DModel(sample_size=64, in_channels=14, out_channels=14,
            down_block_types=("DownResnetBlock1D",) * 2, up_block_types=("UpResnetBlock1D",),
            mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", act_fn="swish",
            time_embedding_type="positional", flip_sin_to_cos=False, freq_shift=1,
            block_out_channels=(16, 32), layers_per_block=1, downsample_each_block=False,
            use_timestep_embedding=True), (randn(2, 14, 16), t)),
        "ControlNet": lambda: (d.ControlNetModel(block_out_channels=(32, 64), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
            attention_head_dim=8, norm_num_groups=8, conditioning_embedding_out_channels=(16, 32)),
            (randn(2, 4, 16, 16), t, randn(2, 5, 32), randn(2, 3, 32, 32))),
        "AutoencoderTiny": lambda: (d.AutoencoderTiny(encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 2),
            num_decoder_blocks=(2, 1)), randn(2, 3, 16, 16)),
    }


def open_clip_small() -> Table:
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vc = CLIPVisionCfg(layers=2, width=32, head_width=16, image_size=32, patch_size=8)
    tc = CLIPTextCfg(context_length=8, vocab_size=99, width=32, heads=2, layers=2)
    ex = (randn(2, 3, 32, 32), torch.randint(0, 99, (2, 8)))
    return {
        "CLIP": lambda: (CLIP(16, vc, tc), ex),
        "CLIP-RN": lambda: (CLIP(16, CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=32,
            head_width=16), tc), ex),
        "CoCa": lambda: (CoCa(32, MultimodalCfg(context_length=8, vocab_size=99, width=32, heads=2,
            layers=2), CLIPTextCfg(context_length=8, vocab_size=99, width=32, heads=2, layers=2,
            embed_cls=True, output_tokens=True), CLIPVisionCfg(layers=2, width=32, head_width=16,
            image_size=32, patch_size=8, attentional_pool=True, attn_pooler_queries=4,
            attn_pooler_heads=2, output_tokens=True)), ex),
    }


def monai() -> Table:
    import monai.networks.nets as n

    V = randn(1, 1, 32, 32, 32)
    S = randn(1, 1, 32, 32)
    return {
        "SegResNet": lambda: (n.SegResNet(init_filters=8), V),
        "SegResNetVAE": lambda: (n.SegResNetVAE((32, 32, 32), init_filters=8), V),
        "UNet": lambda: (n.UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), V),
        "DynUNet": lambda: (n.DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 32],
            res_block=True), V),
        "UNETR": lambda: (n.UNETR(1, 2, (32, 32, 32), feature_size=8, hidden_size=32, mlp_dim=64,
            num_heads=2), V),
        "SwinUNETR": lambda: (n.SwinUNETR(1, 2, feature_size=12, spatial_dims=2,
            depths=(2, 2, 2, 2), num_heads=(1, 1, 2, 2)), randn(1, 1, 64, 64)),
        "VNet": lambda: (n.VNet(2, 1, 2, dropout_prob_up=(0.5, 0.5)), randn(1, 1, 32, 32)),
        "ViT": lambda: (n.ViT(1, (32, 32), (8, 8), hidden_size=32, mlp_dim=64, num_layers=2,
            num_heads=2, spatial_dims=2), S),
        "ViTAutoEnc": lambda: (n.ViTAutoEnc(1, (32, 32), (4, 4), hidden_size=32, mlp_dim=64,
            num_layers=2, num_heads=2, spatial_dims=2), S),
        "ResNet18": lambda: (n.resnet18(spatial_dims=2, n_input_channels=1, num_classes=2), S),
        "SEResNet50": lambda: (n.SEResNet50(spatial_dims=2, in_channels=1, num_classes=2),
            randn(1, 1, 64, 64)),
        "FlexibleUNet": lambda: (n.FlexibleUNet(1, 2, "efficientnet-b0", spatial_dims=2,
            pretrained=False), randn(1, 1, 64, 64)),
        "HighResNet": lambda: (n.HighResNet(2, 1, 2), S),
        "DiffusionUNet": lambda: (n.DiffusionModelUNet(2, 1, 1, channels=(8, 16),
            attention_levels=(False, True), num_res_blocks=1, num_head_channels=8,
            norm_num_groups=4), (S, torch.tensor([1]))),
        "AutoencoderKL": lambda: (n.AutoencoderKL(2, 1, 1, (1, 1), (8, 16), (False, True),
            latent_channels=3, norm_num_groups=4), S),
        "MedNeXt": lambda: (n.MedNeXt(spatial_dims=2, in_channels=1, out_channels=2,
            init_filters=8, use_residual_connection=True), randn(1, 1, 64, 64)),
        "EfficientNet": lambda: (n.EfficientNetBN("efficientnet-b0", pretrained=False,
            spatial_dims=2, in_channels=1, num_classes=2), randn(1, 1, 64, 64)),
        "RegUNet": lambda: (n.RegUNet(2, 1, 8, 2, out_channels=2), S),
        "BasicUNet": lambda: (n.BasicUNet(2, 1, 2, (8, 8, 16, 16, 16, 8)), S),
        "AttentionUnet": lambda: (n.AttentionUnet(2, 1, 2, (8, 16, 32), (2, 2)), S),
    }


def torch_geometric() -> Table:
    import torch_geometric.nn as g

    x = randn(12, 16)
    e = torch.randint(0, 12, (2, 40))

    class Stack(nn.Module):
        def __init__(self, layer: Callable[[], nn.Module], depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layer() for _ in range(depth))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, edges)
            return x

    class Residual(Stack):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            for conv in self.layers:
                x = x + torch.relu(functional.layer_norm(conv(x, edges), (16,)))
            return x

    def residual(conv: Callable[[], nn.Module]) -> tuple[nn.Module, Any]:
        return Residual(conv, 3), (x, e)

    def deep(block: str) -> nn.Module:
        return g.DeepGCNLayer(g.GENConv(16, 16), nn.LayerNorm(16), nn.ReLU(), block=block)

    convs = {
        "GCN": lambda: g.GCNConv(16, 16), "SAGE": lambda: g.SAGEConv(16, 16),
        "GAT": lambda: g.GATConv(16, 16), "GIN": lambda: g.GINConv(nn.Linear(16, 16)),
        "TransformerConv": lambda: g.TransformerConv(16, 16),
        "GATv2": lambda: g.GATv2Conv(16, 16), "Cheb": lambda: g.ChebConv(16, 16, 2),
        "GEN": lambda: g.GENConv(16, 16), "Graph": lambda: g.GraphConv(16, 16),
    }

    def near(positions: Tensor, *_: Any, **__: Any) -> Tensor:  # without the compiled package
        return torch.combinations(torch.arange(len(positions))).T

    g.models.schnet.radius_graph = g.models.visnet.radius_graph = near
    atoms = torch.randint(1, 9, (8,)), randn(8, 3), torch.zeros(8, dtype=torch.long)
    return {
        **{f"residual-{name}": partial(residual, conv) for name, conv in convs.items()},
        "DeepGCN-res+": lambda: (Stack(lambda: deep("res+"), 3), (x, e)),
        "DeepGCN-res": lambda: (Stack(lambda: deep("res"), 3), (x, e)),
        "GPS": lambda: (Stack(lambda: g.GPSConv(16, g.GCNConv(16, 16), heads=2), 2), (x, e)),
        "SchNet": lambda: (g.SchNet(16, 16, 3, 10), atoms),
        "ViSNet": lambda: (g.models.ViSNet(num_heads=2, num_layers=4, hidden_channels=16,
            num_rbf=8), atoms),
    }


def torchaudio() -> Table:
    import torchaudio.models as m

    return {
        "Conformer": lambda: (m.Conformer(input_dim=16, num_heads=2, ffn_dim=32, num_layers=3,
            depthwise_conv_kernel_size=3), (randn(2, 10, 16), torch.tensor([10, 8]))),
        "Wav2Vec2": lambda: (m.wav2vec2_model(extractor_mode="group_norm",
            extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)], extractor_conv_bias=False,
            encoder_embed_dim=32, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=4,
            encoder_pos_conv_groups=2, encoder_num_layers=3, encoder_num_heads=2,
            encoder_attention_dropout=0.0, encoder_ff_interm_features=64,
            encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False,
            encoder_layer_drop=0.0, aux_num_out=None), randn(2, 400)),
        "Emformer": lambda: (m.Emformer(16, 2, 32, 3, segment_length=4, right_context_length=1),
            (randn(2, 9, 16), torch.tensor([8, 8]))),
        "ConvTasNet": lambda: (m.ConvTasNet(num_sources=2, enc_num_feats=16, msk_num_feats=8,
            msk_num_hidden_feats=16, msk_num_layers=2, msk_num_stacks=2), randn(2, 1, 200)),
        "WaveRNN": lambda: (m.WaveRNN(upsample_scales=[2, 2], n_classes=8, hop_length=4,
            n_res_block=2, n_rnn=16, n_fc=16, n_freq=8, n_hidden=8, n_output=8), (randn(2, 1, 24),
            randn(2, 1, 8, 10))),
        "HDemucs": lambda: (m.HDemucs(["a", "b"], channels=8, depth=4, nfft=256),
            randn(1, 2, 2048)),
        "Tacotron2": lambda: (m.Tacotron2(n_mels=8, symbol_embedding_dim=16,
            encoder_embedding_dim=16, decoder_rnn_dim=16, attention_rnn_dim=16,
            attention_hidden_dim=8, prenet_dim=8, postnet_embedding_dim=8), (torch.randint(0, 40,
            (2, 6)), torch.tensor([6, 5]), randn(2, 8, 7), torch.tensor([7, 6]))),
        "RNNT": lambda: (m.rnnt.emformer_rnnt_model(input_dim=16, encoding_dim=16, num_symbols=20,
            segment_length=4, right_context_length=1, time_reduction_input_dim=8,
            time_reduction_stride=2, transformer_num_heads=2, transformer_ffn_dim=16,
            transformer_num_layers=2, transformer_dropout=0.0, transformer_activation="gelu",
            transformer_left_context_length=5, transformer_max_memory_size=0,
            transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True,
            symbol_embedding_dim=8, num_lstm_layers=2, lstm_layer_norm=True,
            lstm_layer_norm_epsilon=0.001, lstm_dropout=0.0), (randn(2, 10, 16),
            torch.tensor([8, 8]), torch.randint(0, 20, (2, 5)), torch.tensor([5, 5]), None)),
        "SquimObjective": lambda: (m.squim_objective_model(feat_dim=16, win_len=16, d_model=16,
            nhead=2, hidden_dim=16, num_blocks=2, rnn_type="LSTM", chunk_size=7), randn(1, 400)),
    }


def speechbrain() -> Table:
    from speechbrain.lobes.models.dual_path import (
        Dual_Path_Model,
        SBTransformerBlock,
    )
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
    from speechbrain.lobes.models.ResNet import ResNet
    from speechbrain.lobes.models.transformer.Branchformer import BranchformerEncoder
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder
    from speechbrain.lobes.models.transformer.Transformer import TransformerEncoder
    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR
    from speechbrain.lobes.models.Xvector import Xvector
    from speechbrain.nnet.attention import RelPosEncXL

    class Positioned(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.positions, self.encoder = RelPosEncXL(16), encoder

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x, pos_embs=self.positions(x))[0]

    return {
        "TransformerEncoder": lambda: (TransformerEncoder(num_layers=3, nhead=2, d_ffn=32,
            d_model=16), randn(2, 7, 16)),
        "TransformerASR": lambda: (TransformerASR(tgt_vocab=20, input_size=16, d_model=16, nhead=2,
            num_encoder_layers=2, num_decoder_layers=2, d_ffn=32, attention_type="regularMHA"),
            (randn(2, 7, 16), torch.randint(0, 20, (2, 5)), torch.ones(2))),
        "ConformerASR": lambda: (TransformerASR(tgt_vocab=20, input_size=16, d_model=16, nhead=2,
            num_encoder_layers=2, num_decoder_layers=2, d_ffn=32, encoder_module="conformer",
            normalize_before=True, attention_type="RelPosMHAXL"), (randn(2, 7, 16),
            torch.randint(0, 20, (2, 5)), torch.ones(2))),
        "ECAPA": lambda: (ECAPA_TDNN(16, channels=[16] * 5, attention_channels=8, lin_neurons=8,
            res2net_scale=2, se_channels=8), randn(2, 20, 16)),
        "ResNet": lambda: (ResNet(input_size=40, channels=[8, 8, 16, 16],
            block_sizes=[1, 2, 1, 1]), randn(2, 40, 40)),
        "Xvector": lambda: (Xvector(in_channels=16, tdnn_channels=[16] * 5, lin_neurons=8),
            randn(2, 30, 16)),
        "Branchformer": lambda: (Positioned(BranchformerEncoder(2, 16, 2, kernel_size=7,
            attention_type="RelPosMHAXL", csgu_linear_units=32)), randn(2, 9, 16)),
        "Conformer": lambda: (Positioned(ConformerEncoder(2, 16, 32, 2, kernel_size=7)),
            randn(2, 9, 16)),
        "SepformerBlock": lambda: (SBTransformerBlock(num_layers=2, d_model=16, nhead=2, d_ffn=32),
            randn(2, 9, 16)),
        "DualPath": lambda: (Dual_Path_Model(16, 16, SBTransformerBlock(num_layers=1, d_model=16,
            nhead=2, d_ffn=32), SBTransformerBlock(num_layers=1, d_model=16, nhead=2, d_ffn=32),
            num_layers=2, K=10), randn(2, 16, 40)),
    }


def peft() -> Table:
    import peft
    import transformers as t

    T = torch.randint(0, 99, (2, 8))

    def adapted(config: Callable[[], Any]) -> tuple[nn.Module, Any]:
        small = t.LlamaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, use_cache=False)
        return peft.get_peft_model(t.LlamaForCausalLM(small), config()), {"input_ids": T}

    configs = {
        "lora": lambda: peft.LoraConfig(target_modules=["q_proj", "v_proj"]),
        "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"]),
        "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
        "all": lambda: peft.LoraConfig(target_modules="all-linear"),
    }
    return {
        **{name: partial(adapted, config) for name, config in configs.items()},
    }


def pytorch() -> Table:
    kw = {"d_model": 16, "nhead": 2, "dim_feedforward": 32, "batch_first": True}
    x = randn(2, 5, 16)
    return {
        "Encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(**kw), 3), x),
        "Encoder-norm_first": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(**kw,
            norm_first=True), 3, enable_nested_tensor=False), x),
        "Decoder": lambda: (nn.TransformerDecoder(nn.TransformerDecoderLayer(**kw), 3), (x,
            randn(2, 4, 16))),
        "Transformer": lambda: (nn.Transformer(16, 2, 2, 2, 32, batch_first=True), (x, x)),
    }


BUILDERS: dict[str, Callable[[], Table]] = {
    "pytorch": pytorch,
    "peft": peft,
    "torch_geometric": torch_geometric,
    "diffusers": diffusers,
    "x_transformers": x_transformers,
    "vit_pytorch": vit_pytorch,
    "open_clip_small": open_clip_small,
    "monai": monai,
    "torchaudio": torchaudio,
    "speechbrain": speechbrain,
}
