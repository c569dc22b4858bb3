"""The ranks that took part in a sum, as told by marks in front of the codes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd.options import digest

__all__ = ["MARKS", "Contribution", "everyone", "mark", "rank_weight", "read_marks"]

MARKS = 16
"""Words of the marks: more than they hold, so that the codes begin on a cache line."""


@dataclass(frozen=True)
class Contribution:
    """The ranks that added their codes to a payload, as sums over these ranks.

    A rank that left by ``hvd.join()`` adds zeros to everything, and so is not counted.
    """

    count: int
    ranks: int
    weights: int
    here: int
    """Ranks that have not left: with those that sent no codes."""

    def of_mean(self, scale: float) -> float:
        """The factor of the mean over these ranks that is ``scale`` times their sum."""
        # A share of 1/n, times n, may not be one again.
        return 1.0 if scale == 1 / self.count else scale * self.count


@functools.cache
def rank_weight(rank: int) -> int:
    """16 random bits, so that hardly any other ranks have the mean that all ranks have."""
    return digest(("rank", rank)) >> 15


@functools.lru_cache(maxsize=8)
def everyone(world_size: int) -> Contribution:
    """The contribution of all ranks."""
    ranks = range(world_size)
    return Contribution(world_size, sum(ranks), sum(map(rank_weight, ranks)), world_size)


def mark(marks: Tensor, rank: int, takes_part: bool) -> None:
    """Writes the marks of a rank."""
    own = (1, rank, rank_weight(rank)) if takes_part else (0, 0, 0)
    numbers = torch.tensor([*own, 1], dtype=marks.dtype, device="cpu")
    marks[4:MARKS] = 0
    marks[:4].copy_(numbers, non_blocking=True)


def read_marks(marks: Tensor) -> Contribution:
    """The contribution, from summed marks."""
    return Contribution(*marks[:4].tolist())
