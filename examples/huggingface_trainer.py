"""Hugging Face Trainer: gates by its own count of steps, so that a checkpoint needs no more."""

import tempfile

import torch
import transformers as hf

import stochastic_depth as sd


class Gates(hf.TrainerCallback):
    def on_step_begin(self, args, state, control, model, **_):
        sd.handle_of(model).step = state.global_step

    on_substep_end = on_step_begin  # the micro-batches of a step run under the same gates


def train(make, data, folder, **resume):
    hf.set_seed(0)
    example = {name: value[None] for name, value in data[0].items()}
    handle = sd.apply(model := make(), sd.LinearDecay(0.5), example=example)
    options = {"max_steps": 8, "save_steps": 4, "gradient_accumulation_steps": 2, "use_cpu": True}
    arguments = hf.TrainingArguments(folder, report_to="none", disable_tqdm=True, **options)
    loss = hf.Trainer(model, arguments, train_dataset=data, callbacks=[Gates()]).train(**resume)
    ran = f"{handle.gates.sum()} of {len(handle.blocks)} blocks ran in step {handle.step}"
    print(f"{type(model).__name__}: loss {loss.training_loss:.2f}, {ran}")
    return list(model.parameters())


gpt2 = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=6, n_head=2, use_cache=False)
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
