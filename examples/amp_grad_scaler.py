"""AMP: autocast to float16 with a gradient scaler, which may skip an optimizer step."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images, labels = (images.float() / 16).view(-1, 1, 8, 8).to(device), labels.to(device)

model = CifarResNet(14, channels=1).to(device)
handle = sd.apply(model, sd.LinearDecay(0.5))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, init_scale=2.0**22)  # too large, so that it has to shrink
for step in range(16):
    chosen = torch.randint(len(images), (64,), device=device)
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.float16):
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    if step % 5 == 0:
        print(
            f"step {step:2}  loss {loss:.2f}  scale 2^{torch.tensor(scaler.get_scale()).log2():g}"
        )
print(f"gates were drawn for {handle.step} steps, those that the scaler skipped among them")
