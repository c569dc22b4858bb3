"""The interface of selections, and the way of elements into a small tensor and back."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.selections.memory import Memory

__all__ = ["Chosen", "Groups", "Selection"]


class Groups(NamedTuple):
    """The division of a tensor in groups of consecutive units."""

    numel: int
    """Elements of the tensor."""
    unit: int
    """Elements of a unit; the last one of the tensor may be shorter."""
    size: int
    """Units of a group; the last one may have fewer."""

    @property
    def number(self) -> int:
        """How many groups there are, and so units that are kept."""
        return -(-self.numel // (self.unit * self.size))

    @property
    def kept(self) -> int:
        """Elements that are kept; a unit counts in full."""
        return self.number * self.unit

    @property
    def last(self) -> int:
        """Units of the last group."""
        return -(-self.numel // self.unit) - (self.number - 1) * self.size


@dataclass(frozen=True)
class Chosen:
    """The units of a tensor that are kept, one of each group, in their order.

    Args:
        groups: of the tensor.
        units: numbers of the units, counted through the tensor, int64 of shape (groups.number,).
        short: whether the last one of these is shorter than the others.
    """

    groups: Groups
    units: Tensor
    short: bool = False

    def take(self, x: Tensor, out: Tensor) -> None:
        """Copies the kept elements of ``x`` to ``out``; a short unit is filled up with zeros."""
        rows, whole, tail = self._parts(x, out)
        torch.index_select(rows, 0, self.units[: len(whole)], out=whole)
        if self.short:
            begin = x.numel() // self.groups.unit * self.groups.unit
            tail.zero_()[0, : x.numel() - begin] = x.view(-1)[begin:]

    def spread(self, kept: Tensor, out: Tensor) -> None:
        """Copies the kept elements to their places in ``out``, and writes zeros to all others."""
        out.zero_()
        rows, whole, tail = self._parts(out, kept.to(out.dtype))
        rows.index_copy_(0, self.units[: len(whole)], whole)
        if self.short:
            begin = out.numel() // self.groups.unit * self.groups.unit
            out.view(-1)[begin:] = tail[0, : out.numel() - begin]

    def add(self, kept: Tensor, to: Tensor) -> None:
        """Adds the kept elements to those at their places in ``to``."""
        rows, whole, tail = self._parts(to, kept.to(to.dtype))
        rows.index_add_(0, self.units[: len(whole)], whole)
        if self.short:
            begin = to.numel() // self.groups.unit * self.groups.unit
            to.view(-1)[begin:] += tail[0, : to.numel() - begin]

    def left(self, x: Tensor) -> Tensor:
        """``x``, which is flat, with zeros in place of the kept elements."""
        count = self.groups.number - self.short
        whole = x.numel() // self.groups.unit * self.groups.unit
        x[:whole].view(-1, self.groups.unit).index_fill_(0, self.units[:count], 0)
        if self.short:
            x[whole:] = 0
        return x

    def _parts(self, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The whole units of ``x``, and the whole and the short ones that are kept."""
        unit, count = self.groups.unit, self.groups.number - self.short
        rows = x.view(-1)[: x.numel() // unit * unit].view(-1, unit)
        each = kept.view(-1, unit)
        return rows, each[:count], each[count:]


class Selection(ABC):
    """The units that one rank keeps.

    Args:
        size: units of a group, of which one is kept.
        seed: of the hash.
        rank, world_size: this rank, and the number of ranks.
        feedback: whether there is error feedback.
        unbiased: whether the result is unbiased with error feedback too.
    """

    unit: ClassVar[int]
    """Elements of a unit."""
    led: ClassVar[bool]
    """Whether a leader chooses, and tells the other ranks."""

    def __init__(
        self, size: int, seed: int, rank: int, world_size: int, feedback: bool,
        unbiased: bool = False,
    ) -> None:  # fmt: skip
        self.size, self.seed, self.feedback = size, seed, feedback
        self.rank, self.world_size = rank, world_size
        self.in_turn = feedback and not unbiased
        """Whether units take turns, where a selection has no other rule for that."""

    def groups(self, numel: int) -> Groups:
        """The groups of a tensor of ``numel`` elements."""
        return Groups(numel, self.unit, self.size)

    def dtype(self, of: torch.dtype) -> torch.dtype:
        """Type of the chosen elements of a gradient of this type."""
        return Memory.dtype(of) if self.feedback else of

    def scaled(self, chosen: Chosen, mean: Tensor) -> Tensor:
        """The estimate of the mean of a tensor at the chosen places, given that of the chosen
        elements, which may be overwritten."""
        return mean
