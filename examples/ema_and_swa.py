"""EMA and SWA: an average is a copy with independent gates; BatchNorm is updated at full depth."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = (images.float() / 16).view(-1, 1, 8, 8)

model = CifarResNet(20, channels=1)
handle = sd.apply(model, sd.LinearDecay(0.5), schedule=sd.Warmup(100))
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
swa = AveragedModel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
order = torch.Generator().manual_seed(0)
for step in range(100):
    chosen = torch.randint(1500, (64,), generator=order)
    optimizer.zero_grad()
    F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
    optimizer.step()
    ema.update_parameters(model)
    if step >= 70 and step % 5 == 0:
        swa.update_parameters(model)

for average in (ema, swa):
    own = sd.handle_of(average.module)  # the copy's handle, which has drawn nothing
    own.step = handle.step  # with a schedule: p_l of the step of the average
    with own.full_depth():
        update_bn(images[:1500].split(100), average)

for name, each in {"model": model, "EMA": ema, "SWA": swa}.items():
    with torch.inference_mode():
        wrong = each.eval()(images[1500:]).argmax(1) != labels[1500:]
    print(f"{name:5}  {100 * wrong.float().mean():4.1f} % wrong")
