"""Transformers, with a tiny GPT: torchrun --nproc-per-node 2 examples/counting_transformers.py"""

from __future__ import annotations

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.transformers import GQSGDCallback


def counting(length=32, count=512):
    """Sequences that count up modulo 50, which are learned fast."""
    start = torch.randint(50, (count, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (start + torch.arange(length)) % 50]


def train(compressor, steps, folder, resume=None):
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=32, n_embd=64, n_layer=2, n_head=2)
    )
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=20, per_device_train_batch_size=8, learning_rate=3e-3,
        use_cpu=True, ddp_backend="gloo", report_to=[], disable_tqdm=True, logging_steps=10,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=counting())
    if compressor is not None:
        trainer.add_callback(GQSGDCallback(trainer, compressor))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    compressor = GlobalQSGD(bits=8)
    train(compressor, steps=60, folder=tempfile.mkdtemp())
    print(compressor.stats())
