"""The exchange of a rank that is alone: nothing is sent, so nothing is rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.exchanges.base import Exchange, Running, Terms
from hvd_gqsgd.exchanges.collectives import Kept
from hvd_gqsgd.exchanges.contribution import Contribution, everyone

__all__ = ["AloneExchange"]


class AloneExchange(Exchange):
    """The result is the tensor itself, times the scale."""

    messages = ("alone",)
    alone = True

    @property
    def summands(self) -> int:
        """See :class:`Exchange`."""
        return 1

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        yield Kept("alone", torch.empty(self._header, dtype=torch.int64, device="cpu"))
        return _Own(everyone(1))


@dataclass(frozen=True)
class _Own:
    contribution: Contribution

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        for item, out in zip(items, outs, strict=True):
            if scale == 1:
                out.copy_(item.x)
            else:
                torch.mul(item.x, scale, out=out)
