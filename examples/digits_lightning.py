"""Lightning, on the digits, in 2 processes: python examples/digits_lightning.py"""

import lightning
import torch
from digits import load_data, make_model
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.lightning import GQSGDStrategy


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def train(strategy, epochs, folder=None, resume=None):
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, default_root_dir=folder,
        logger=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(Digits(), DataLoader(load_data(0)[0], 32), ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    compressor = GlobalQSGD(bits=8)
    train(GQSGDStrategy(compressor), epochs=4)
    print(compressor.stats())
