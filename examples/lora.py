"""LoRA with peft: adapters are trained in the layers that a step runs, and nothing else changes."""

import statistics
import time

import peft
import torch
import transformers as hf

import stochastic_depth as sd

width = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
config = hf.LlamaConfig(vocab_size=256, num_hidden_layers=8, num_key_value_heads=2, **width)
ids = torch.arange(4 * 128).view(4, 128) % 250
batch = {"input_ids": ids, "labels": ids, "use_cache": False}


def adapted(**options):
    hf.set_seed(0)
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf.LlamaForCausalLM(config), lora)
    if options:  # after the adapters are added
        sd.apply(model, sd.LinearDecay(0.5), balance=True, example=batch, **options)
    return model


models = {
    "all layers": adapted(),
    "skipped": adapted(closed="skipped", skipped="freeze", scale="training"),
    "forward-only": adapted(closed="forward-only", skipped="freeze"),  # only the backward pass
}
seconds = {name: [] for name in models}
for _ in range(11):
    for name, model in models.items():  # alternately, so that all see the same load
        start = time.perf_counter()
        model(**batch).loss.backward()
        seconds[name].append(time.perf_counter() - start)
full, *rest = (statistics.median(seconds[name]) for name in models)
for name, median in zip(list(models)[1:], rest, strict=True):
    print(f"{name}: {100 * (1 - median / full):.0f} % of the time saved")
