"""Ray Train, on the digits, in 2 workers: python examples/digits_ray.py"""

from __future__ import annotations

import ray.train
import torch
from digits import load_data, make_model
from ray.train.torch import TorchTrainer, prepare_data_loader
from torch.nn import functional as F
from torch.utils.data import DataLoader

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.ray import prepare_model


def train(compressor, epochs, folder=None, resume=None):
    torch.manual_seed(0)
    model = prepare_model(make_model(), compressor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = {"model": model, "optimizer": optimizer, "compressor": compressor}
    if resume is not None:
        for key, state in torch.load(f"{resume}/state.pt", weights_only=True).items():
            parts[key].load_state_dict(state)
    loader = prepare_data_loader(DataLoader(load_data(0)[0], 32))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    if folder is not None and ray.train.get_context().get_world_rank() == 0:
        torch.save({key: part.state_dict() for key, part in parts.items()}, f"{folder}/state.pt")
    print(compressor and compressor.stats())
    return model


if __name__ == "__main__":
    workers = ray.train.ScalingConfig(num_workers=2)
    TorchTrainer(lambda: train(GlobalQSGD(bits=8), epochs=4), scaling_config=workers).fit()
