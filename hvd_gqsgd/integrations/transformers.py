"""Transformers: ``trainer.add_callback(GQSGDCallback(trainer, GlobalQSGD(bits=4)))``."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.ddp import attach

__all__ = ["GQSGDCallback"]


class GQSGDCallback(TrainerCallback, ExportableState):
    """Compresses the gradients of a ``Trainer`` that runs on several processes with DDP.

    The trainer's checkpoints contain the state of the compressor.

    Args:
        trainer: the trainer that this callback is added to. Callbacks do not receive the model
            that DDP wraps, so the trainer must exist first.
        compressor: the compressor, whose ``stats()`` has the counts.
    """

    def __init__(self, trainer: Trainer, compressor: GlobalQSGD) -> None:
        self.trainer = trainer
        self.compressor = compressor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Registers the hook, and restores the compressor if the training is resumed.

        Args:
            args: the ``TrainingArguments``; not used.
            state: the ``TrainerState``, with the step and the saved states of callbacks.
            control: the ``TrainerControl``; not used.
            kwargs: the trainer's other objects; not used.

        Raises:
            TypeError: on several processes, the trainer has not wrapped the model in DDP.
        """
        if state.global_step:
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is not None:
                self.compressor.load_state_dict(saved["attributes"]["compressor_state"])
        attach(self.trainer.model_wrapped, self.compressor)

    def state(self) -> dict[str, Any]:
        """Returns the content for a checkpoint, with ``state_dict()`` of the compressor."""
        return {"args": {}, "attributes": {"compressor_state": self.compressor.state_dict()}}
