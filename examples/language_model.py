"""A language model with transformers' Trainer: pretraining, then fine-tuning."""

import argparse
import inspect
import tempfile

import torch
import transformers as hf

import stochastic_depth as sd
from stochastic_depth.integrations.transformers import StochasticDepthCallback

text = torch.tensor(list(inspect.getsource(argparse).encode()))  # one token per byte
data = [{"input_ids": row, "labels": row} for row in text[: 64 * 512].view(-1, 64)]
width = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
config = hf.LlamaConfig(vocab_size=256, num_hidden_layers=8, num_key_value_heads=2, **width)


def train(model, *callbacks, steps=8, rate=1e-3):
    options = {"max_steps": steps, "learning_rate": rate, "save_strategy": "no", "use_cpu": True}
    folder = tempfile.mkdtemp()  # use_cache=False is the Trainer's own default
    arguments = hf.TrainingArguments(folder, report_to="none", disable_tqdm=True, **options)
    trainer = hf.Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train()


hf.set_seed(0)
model = hf.LlamaForCausalLM(config)
train(model, StochasticDepthCallback(sd.LinearDecay(0.5), balance=True))
saved = sd.summary(model, {"input_ids": data[0]["input_ids"][None]}).expected_saving
print(f"pretraining: {100 * saved:.0f} % of the FLOPs saved")

sd.remove(model)  # to fine-tune: a mild rule, and evaluation without scaling
mild = StochasticDepthCallback(sd.LinearDecay(0.8), scale="training", skipped="freeze")
train(model, mild, steps=4, rate=1e-4)
print(f"fine-tuning: {mild.handle.expected_depth:.1f} of {len(mild.handle.blocks)} layers a step")
