"""Lightning: ``Trainer(strategy=GQSGDStrategy(GlobalQSGD(bits=4)))``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.integrations.ddp import attach

__all__ = ["GQSGDStrategy"]

KEY = "hvd_gqsgd"
"""Key of the compressor's state in checkpoints."""


class GQSGDStrategy(DDPStrategy):
    """DDP with compressed gradients, on CPUs too, where Lightning's own strategy registers no hook.

    Lightning's checkpoints contain the state of the compressor.

    Args:
        compressor: the compressor, whose ``stats()`` has the counts; None: the defaults.
        ddp: arguments of ``DDPStrategy``.
    """

    def __init__(self, compressor: GlobalQSGD | None = None, **ddp: Any) -> None:
        super().__init__(**ddp)
        self.compressor = compressor or GlobalQSGD()

    def configure_ddp(self) -> None:
        """Wraps the model and registers the hook.

        Raises:
            TypeError: on several ranks, Lightning has not wrapped the model in DDP.
        """
        super().configure_ddp()
        attach(self.model, self.compressor)

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint with the state of the compressor.

        Args:
            checkpoint: the content of the checkpoint, to which the state is added.
            args: further arguments of ``DDPStrategy.save_checkpoint``.
            kwargs: further keywords of it.
        """
        checkpoint[KEY] = self.compressor.state_dict()
        super().save_checkpoint(checkpoint, *args, **kwargs)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns a checkpoint, and restores the state of the compressor if the checkpoint has one.

        Args:
            args: arguments of ``DDPStrategy.load_checkpoint``.
            kwargs: keywords of it.
        """
        checkpoint: dict[str, Any] = super().load_checkpoint(*args, **kwargs)
        if KEY in checkpoint:
            self.compressor.load_state_dict(checkpoint[KEY])
        return checkpoint
