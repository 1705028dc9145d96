"""timm: a model's own drop path rates, really skipped, and timm's checkpoints."""

import tempfile

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.utils import CheckpointSaver, ModelEmaV3

import stochastic_depth as sd

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = F.interpolate((images.float() / 16).view(-1, 1, 8, 8), scale_factor=4)


def create(**options):
    return timm.create_model("resnet14t", in_chans=1, num_classes=10, **options)


model = create(drop_path_rate=0.4)
# The rates are in the blocks, and the scaling is that of timm's DropPath.
handle = sd.apply(model, "own", example=images[:2])
print("p_l:", *(f"{p:.2f}" for p in handle.survival))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ema = ModelEmaV3(model, decay=0.5)  # a copy with independent gates
for step in range(4):
    optimizer.zero_grad()
    F.cross_entropy(model(images[step::40]), labels[step::40]).backward()
    optimizer.step()
    ema.update(model, step=step)

with tempfile.TemporaryDirectory() as folder:
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=folder)
    saver.save_checkpoint(epoch=0, metric=1.0)
    plain = create()  # without stochastic depth
    timm.models.load_checkpoint(plain, f"{folder}/last.pth.tar", use_ema=True)
with torch.inference_mode():
    difference = plain.eval()(images[:8]) - ema.eval()(images[:8])
print("timm's own model from the checkpoint differs by", difference.abs().max().item())
