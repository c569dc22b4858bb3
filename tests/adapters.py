"""Trains with an adapter's example: plainly, compressed, and compressed again from a checkpoint.

``torchrun --nproc-per-node 2 tests/adapters.py NAME FOLDER``; rank 0 prints the results as JSON.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from digits import load_data
from torch import nn

from hvd_gqsgd import GlobalQSGD

Run = Callable[[GlobalQSGD | None, int, Path | None, Path | None], float]
"""Trains for so many rounds, saving to a folder and resuming from one; returns the loss."""


def loss_of(model: nn.Module) -> float:
    images, labels = load_data(0)[0].tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


def lightning() -> Run:
    import digits_lightning
    from lightning.pytorch.strategies import DDPStrategy

    from hvd_gqsgd.integrations.lightning import GQSGDStrategy

    def run(compressor, rounds, folder, resume):
        strategy = GQSGDStrategy(compressor) if compressor else DDPStrategy()
        resume = resume and resume / "state.ckpt"
        place = folder or Path(sys.argv[2]) / "unused"  # it saves checkpoints in any case
        trainer = digits_lightning.train(strategy, rounds, place, resume)
        if folder:
            trainer.save_checkpoint(folder / "state.ckpt")
        return loss_of(trainer.lightning_module.model)

    return run


def accelerate() -> Run:
    import digits_accelerate

    def run(compressor, rounds, folder, resume):
        model = digits_accelerate.train(compressor, 1 if resume else rounds, folder, resume)
        return loss_of(model.module)

    return run


def transformers() -> Run:
    import counting_transformers

    def run(compressor, rounds, folder, resume):
        steps, folder = 20 * rounds, folder or resume or Path(sys.argv[2]) / "plain"
        checkpoint = resume and str(resume / f"checkpoint-{steps - 20}")
        trainer = counting_transformers.train(compressor, steps, str(folder), checkpoint)
        batch = counting_transformers.counting()[:64]
        ids = torch.stack([row["input_ids"] for row in batch]).to(trainer.args.device)
        with torch.no_grad():
            return float(trainer.model(input_ids=ids, labels=ids).loss)

    return run


def deepspeed(stage: int) -> Run:
    import digits_deepspeed

    def run(compressor, rounds, folder, resume):
        rounds = 1 if resume else rounds
        engine = digits_deepspeed.train(compressor, rounds, folder, resume, stage)
        return loss_of(engine.module)

    return run


def ray() -> Run:
    import digits_ray

    def run(compressor, rounds, folder, resume):
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return loss_of(digits_ray.train(compressor, 1 if resume else rounds, folder, resume).module)

    return run


RUNS: dict[str, Callable[[], Run]] = {
    "lightning": lightning,
    "accelerate": accelerate,
    "transformers": transformers,
    "ray": ray,
    **{f"deepspeed-{stage}": functools.partial(deepspeed, stage) for stage in (0, 1, 2)},
}


def main(name: str, folder: Path) -> None:
    sys.argv[1:] = [name, str(folder)]
    run = RUNS[name]()
    whole, first, second = GlobalQSGD(), GlobalQSGD(), GlobalQSGD()
    result: dict[str, Any] = {
        "plain": run(None, 2, None, None),
        "compressed": run(whole, 2, folder / "whole", None),
    }
    run(first, 1, folder / "half", None)
    result["resumed"] = run(second, 2, None, folder / "half")
    result["ratio"] = whole.stats().ratio
    result["steps"] = [each.state_dict()["step"] for each in (whole, first, second)]
    result["counted"] = [each.stats().steps for each in (whole, first, second)]
    if os.environ["RANK"] == "0":
        print("RESULT", json.dumps(result), flush=True)


def main_of_ray(folder: Path) -> None:
    """Runs ``main`` in two workers, which Ray launches."""
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    here = Path(__file__).parent
    inherited = os.environ.get("PYTHONPATH")
    path = [str(here), str(here.parent), str(here.parent / "examples"), *filter(None, [inherited])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    ray.init(num_cpus=2, include_dashboard=False)

    def loop() -> None:
        import adapters

        adapters.main("ray", folder)

    TorchTrainer(loop, scaling_config=ScalingConfig(num_workers=2)).fit()


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    if name == "ray":
        main_of_ray(folder)
    else:
        main(name, folder)
