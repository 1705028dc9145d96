"""Lightning: the gates' state travels in the Trainer's checkpoints."""

import tempfile

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import stochastic_depth as sd
from stochastic_depth.models import CifarResNet

loader = DataLoader(TensorDataset(torch.randn(512, 3, 8, 8), torch.randint(10, (512,))), 64)


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = CifarResNet(20)
        self.handle = sd.apply(self.network)  # the network inside, before the Trainer sees it

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["depth"] = self.handle.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.handle.load_state_dict(checkpoint["depth"])


folder = tempfile.mkdtemp()
keep = pl.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
options = {"max_epochs": 2, "callbacks": [keep], "logger": False, "enable_progress_bar": False}
pl.Trainer(**options).fit(straight := Classifier(), loader)
pl.Trainer(**options).fit(resumed := Classifier(), loader, ckpt_path=f"{folder}/epoch=0.ckpt")
same = all(map(torch.equal, straight.parameters(), resumed.parameters()))
print(f"step {resumed.handle.step}; as if never stopped, bit for bit: {same}")
