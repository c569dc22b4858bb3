"""Accelerate, on the digits: torchrun --nproc-per-node 2 examples/digits_accelerate.py"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from digits import load_data, make_model
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.accelerate import attach


def train(compressor, epochs, folder=None, resume=None):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(load_data(0)[0], 32, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if compressor is not None:
        attach(accelerator, model, compressor)
    if resume is not None:
        accelerator.load_state(resume)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
    if folder is not None:
        accelerator.save_state(folder)
    return model


if __name__ == "__main__":
    compressor = GlobalQSGD(bits=8)
    train(compressor, epochs=4)
    print(compressor.stats())
