"""Tensors that travel together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd import layout

__all__ = ["Bucket", "Item", "Kind", "kind_of"]

Kind = tuple[torch.dtype, torch.device]


def kind_of(dtype: torch.dtype, device: torch.device) -> Kind:
    """Tensors of one kind may share a bucket: their norms have one type and lie on one device."""
    return layout.norm_dtype(dtype), device


@dataclass
class Item:
    """One tensor of a bucket."""

    x: Tensor
    """Contiguous; deleted once the item is decoded."""
    position: int
    """Items are sorted by it when the bucket is closed."""
    identity: int
    """31 bits that identify the tensor on all ranks, and seed its dither."""
    scale: float | None = None
    """Factor of the sum over the ranks, if it is known in advance."""
    out: Tensor | None = None
    """Contiguous memory to decode to, possibly ``x`` itself; None: from the buffer pool."""
    owed: Tensor | None = None
    """Flat: what this rank owes of the mean, for ``exchanges/owing.py``; None: nothing."""
    place: int = 0
    """Index in the closed bucket."""

    def __post_init__(self) -> None:
        self.numel, self.dtype, self.device = self.x.numel(), self.x.dtype, self.x.device
        self.shape = self.x.shape

    def release(self) -> None:
        """Drops the references to tensors of the user."""
        del self.x
        self.out = self.owed = None


class Bucket:
    """Tensors of one kind, exchanged in the same messages.

    Args:
        name: begins the names of its messages.
        kind: see ``kind_of``.
        stream: of a GPU, for the work on the bucket; None on the CPU.
    """

    def __init__(self, name: str, kind: Kind, stream: torch.cuda.Stream | None = None) -> None:
        self.name = name
        self.stream = stream
        self.norm_dtype, self.device = kind
        self.items: list[Item] = []
        self.nbytes = 0

    def add(self, item: Item) -> None:
        """Adds a tensor."""
        self.items.append(item)
        self.nbytes += item.x.nbytes

    def close(self) -> None:
        """Sorts the tensors; no more are added."""
        self.items.sort(key=lambda item: item.position)
        for place, item in enumerate(self.items):
            item.place = place

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the closed bucket, before they are decoded."""
        return [item.x for item in self.items]

    @property
    def identities(self) -> list[int]:
        """Of the tensors; see :class:`Item`."""
        return [item.identity for item in self.items]

    def layout(self, block_size: int | None, bits: int) -> layout.Layout:
        """Offsets of the tensors in the messages of the closed bucket."""
        tensors = tuple((item.numel, block_size or max(item.numel, 1)) for item in self.items)
        return layout.lay_out(tensors, bits, self.norm_dtype)
