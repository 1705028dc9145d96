"""Lightning: a callback applies stochastic depth, logs it, and resumes it bit for bit."""

import tempfile

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from stochastic_depth.integrations.lightning import StochasticDepth
from stochastic_depth.models import CifarResNet

loader = DataLoader(TensorDataset(torch.randn(512, 3, 8, 8), torch.randint(10, (512,))), 64)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = CifarResNet(20)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


folder = tempfile.mkdtemp()
keep = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
depth = StochasticDepth(sd.LinearDecay(0.5))
options = {"max_epochs": 2, "logger": False, "enable_progress_bar": False}
pl.Trainer(**options, callbacks=[keep, depth]).fit(straight := Classifier(), loader)
again = pl.Trainer(**options, callbacks=[StochasticDepth(sd.LinearDecay(0.5))])
again.fit(resumed := Classifier(), loader, ckpt_path=f"{folder}/epoch=0.ckpt")
for name in ("expected_depth", "realised_depth", "drop_rate"):
    print(f"{name}: {again.callback_metrics[f'stochastic_depth/{name}']:.2f}")
same = all(map(torch.equal, straight.parameters(), resumed.parameters()))
print(f"step {depth.handle.step}; as if never stopped, bit for bit: {same}")
