"""torchvision's reference: its training step, weight averaging and checkpoint."""

import tempfile

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet18

import stochastic_depth as sd

images, labels = torch.randn(192, 3, 32, 32), torch.randint(10, (192,))


def train(first, last, file):
    torch.manual_seed(0)
    model = resnet18(num_classes=10)
    handle = sd.apply(model, example=images[:2])
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    state = {"model": model, "model_ema": ema, "optimizer": optimizer, "handle": handle}
    if first > 0:
        for name, saved in torch.load(file, weights_only=True).items():
            state[name].load_state_dict(saved)
    for step in range(first, last):
        optimizer.zero_grad()
        logits = model(images[step::6])
        F.cross_entropy(logits, labels[step::6], label_smoothing=0.1).backward()
        optimizer.step()
        ema.update_parameters(model)
    torch.save({name: part.state_dict() for name, part in state.items()}, file)
    print(f"step {handle.step}: {handle.gates.sum()} of {len(handle.blocks)} blocks ran")
    return ema.parameters()


checkpoint = f"{tempfile.mkdtemp()}/checkpoint.pth"
straight = train(0, 6, checkpoint)
train(0, 3, checkpoint)
resumed = train(3, 6, checkpoint)
print("as if never stopped, bit for bit:", all(map(torch.equal, straight, resumed)))
