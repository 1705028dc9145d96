"""Diffusion: a transformer of diffusers (DiT) learns to tell the noise from the image."""

import statistics
import time

import diffusers
import torch
import torch.nn.functional as F

import stochastic_depth as sd

heads = {"num_attention_heads": 4, "attention_head_dim": 32, "num_embeds_ada_norm": 10}
shape = {"in_channels": 4, "out_channels": 4, "sample_size": 16, "patch_size": 2}
noises = diffusers.DDPMScheduler()
latents, classes = torch.randn(8, 4, 16, 16), torch.arange(8)


def inputs():
    """Latents at random steps of diffusion, and the noise that was added to them."""
    noise, steps = torch.randn_like(latents), torch.randint(1000, (8,))
    noisy = noises.add_noise(latents, noise, steps)
    return {"hidden_states": noisy, "timestep": steps, "class_labels": classes}, noise


constant, model = (diffusers.DiTTransformer2DModel(num_layers=8, **heads, **shape) for _ in "ab")
handle = sd.apply(model, sd.LinearDecay(0.5), balance=True, example=inputs()[0])
optimizers = {each: torch.optim.AdamW(each.parameters(), 1e-4) for each in (constant, model)}
seconds = {each: [] for each in optimizers}
for _ in range(11):
    given, noise = inputs()
    for each, optimizer in optimizers.items():  # alternately, so that both see the same load
        start = time.perf_counter()
        F.mse_loss(each(**given).sample, noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds[each].append(time.perf_counter() - start)
saved = 1 - statistics.median(seconds[model]) / statistics.median(seconds[constant])
flops = sd.summary(model, given).expected_saving
print(f"{handle.expected_depth:g} of 8 blocks a step, on average: {100 * flops:.0f} % of the FLOPs")
print(f"{100 * saved:.0f} % of the time saved")
