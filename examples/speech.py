"""Speech: taking over a Conformer's layerdrop, under DistributedDataParallel."""

import tempfile

import torch
import torch.distributed as dist
import transformers as hf
from torch.nn.parallel import DistributedDataParallel

import stochastic_depth as sd

width = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
front = {"conv_dim": (32, 32), "conv_stride": (10, 8), "conv_kernel": (20, 16)}
front |= {"num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 4, "vocab_size": 32}
config = hf.Wav2Vec2ConformerConfig(num_hidden_layers=6, layerdrop=0.3, **width, **front)
batch = {"input_values": torch.randn(2, 4000), "labels": torch.randint(1, 32, (2, 12))}


def steps(model, most=12):
    """How many steps go well, under DDP as torchrun would start it."""
    model.wav2vec2_conformer.encoder.pos_conv_embed.requires_grad_(False)  # it is never used
    wrapped = DistributedDataParallel(model.train())
    for step in range(most):
        try:
            wrapped(**batch).loss.backward()
        except RuntimeError as error:
            return f"stopped in step {step}: {str(error).partition(' in the prior')[0]}"
    return f"{most} steps"


dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
hf.set_seed(0)
print("layerdrop:", steps(hf.Wav2Vec2ConformerForCTC(config)))
model = hf.Wav2Vec2ConformerForCTC(config)
handle = sd.apply(model, sd.survival_rule("transformers", 0.3), example=batch)  # before wrapping
print("stochastic depth:", steps(model), f"{handle.expected_depth:.1f} of 6 layers, on average")
saved = sd.summary(model, batch).expected_saving
print(f"{100 * saved:.0f} % of the FLOPs saved; layerdrop is {config.layerdrop} meanwhile")
dist.destroy_process_group()
