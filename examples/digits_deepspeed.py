"""DeepSpeed, on the digits: torchrun --nproc-per-node 2 examples/digits_deepspeed.py"""

from __future__ import annotations

import deepspeed
import torch
from digits import load_data, make_model
from torch.nn import functional as F

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.deepspeed import attach


def train(compressor, epochs, folder=None, resume=None, stage=1):
    torch.manual_seed(0)
    engine, _, loader, _ = deepspeed.initialize(
        model=make_model(), training_data=load_data(0)[0],
        config={
            "train_micro_batch_size_per_gpu": 32, "zero_optimization": {"stage": stage},
            "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
            "zero_allow_untested_optimizer": True,
        },
    )  # fmt: skip
    if compressor is not None:
        attach(engine, compressor)
    if resume is not None:
        compressor.load_state_dict(engine.load_checkpoint(resume)[1]["hvd_gqsgd"])
    for _ in range(epochs):
        for images, labels in loader:
            engine.backward(F.cross_entropy(engine(images), labels))
            engine.step()
    if folder is not None:
        engine.save_checkpoint(folder, client_state={"hvd_gqsgd": compressor.state_dict()})
    return engine


if __name__ == "__main__":
    compressor = GlobalQSGD(bits=8)
    train(compressor, epochs=4)
    print(compressor.stats())
