"""Hugging Face Trainer: a callback applies stochastic depth, logs it, and resumes it exactly."""

import tempfile

import torch
import transformers as hf

import stochastic_depth as sd
from stochastic_depth.integrations.transformers import StochasticDepthCallback


def train(make, data, folder, **resume):
    hf.set_seed(0)
    depth = StochasticDepthCallback(sd.LinearDecay(0.5))
    options = {"max_steps": 8, "save_steps": 4, "gradient_accumulation_steps": 2, "use_cpu": True}
    arguments = hf.TrainingArguments(folder, report_to="none", disable_tqdm=True, **options)
    trainer = hf.Trainer(make(), arguments, train_dataset=data, callbacks=[depth])
    loss, handle = trainer.train(**resume).training_loss, depth.handle
    ran = f"{handle.gates.sum()} of {len(handle.blocks)} blocks ran in step {handle.step}"
    print(f"{type(trainer.model).__name__}: loss {loss:.2f}, {ran}")
    return list(trainer.model.parameters())


gpt2 = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=6, n_head=2)
vit = hf.ViTConfig(hidden_size=32, num_hidden_layers=6, num_attention_heads=2, image_size=32)
words = torch.arange(128 * 32).view(128, 32) % 64
text = [{"input_ids": row, "labels": row} for row in words]
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": row[0] % 2} for row in words]
folder = tempfile.mkdtemp()
straight = train(lambda: hf.GPT2LMHeadModel(gpt2), text, folder)
half = f"{folder}/checkpoint-4"
resumed = train(lambda: hf.GPT2LMHeadModel(gpt2), text, folder, resume_from_checkpoint=half)
print("as if never stopped, bit for bit:", all(map(torch.equal, straight, resumed)))
train(lambda: hf.ViTForImageClassification(vit), images, folder)
