"""Random runs by the hash of the dither, which all ranks can compute, so that no indices travel.

A unit is a run of 32 elements, which costs as much to read as one element. Of each group of m units
one is kept, every one with probability 1/m, and multiplied by m. So with the sum over the units u
of a group, of which one is kept,

    E[C(x)] = x,    E|C(x) - x|^2 = (m - 1) |x|^2

as for Rand-k (Stich, Cordonnier and Jaggi, arXiv 1809.07599, with k/d = 1/m). The last group of a
tensor has fewer units, and its factor is their number.

In a permutation rank r has the r-th run after that one, and so other runs than the other ranks, if
there are not more of them than m: PermK (Szlendak, Tyurin and Richtarik, arXiv 2110.03300).

With residuals, EF21 and EControl the result is not multiplied, and the runs of a group take turns:
in m steps each is sent once, in an order that begins anew, with a hash, after m steps.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd.reference.linear import Array, hash_bits, tile_keys
from hvd_gqsgd.selections.base import Chosen, Groups, Selection

__all__ = ["RandomSelection"]

_STREAM = 2**33  # beside those of native/core/hash.h
_RUN = 32


class RandomSelection(Selection):
    """One run of each group, of all runs with the same probability, down to 2^-32."""

    unit = _RUN
    led = False

    def choose(
        self, numels: Sequence[int], numbers: Sequence[int], identities: Sequence[int],
        device: torch.device, of_rank: int = 0,
    ) -> list[Chosen]:  # fmt: skip
        """The units of each tensor that a rank sends.

        Args:
            numels, identities: of the tensors.
            numbers: of the step or, with error feedback, of the tensors' exchanges before.
            device: for the result.
            of_rank: the rank in a permutation; else 0 for all ranks.
        """
        table = _table(tuple(numels), self.size)
        cycle = self.size if self.in_turn else 1  # after which runs take another order
        keys = [
            tile_keys(1, seed=self.seed, step=number // cycle, tensor_id=identity, stream=_STREAM)
            for identity, number in zip(identities, numbers, strict=True)
        ]
        counts = [groups.number for groups in table.groups]
        bits = hash_bits(np.repeat(np.concatenate(keys), counts), table.numbers)
        within = bits.astype(np.uint64) * table.sizes >> np.uint64(32)
        shifts = np.array([of_rank + number % cycle for number in numbers], np.uint64)
        within = (within + np.repeat(shifts, counts)) % table.sizes
        units = torch.from_numpy(table.firsts + within.astype(np.int64))
        # A short unit is the last one of the tensor, if it was taken; the host must know.
        short = [
            bool(groups.numel % _RUN) and int(own[-1]) == groups.numel // _RUN
            for groups, own in zip(table.groups, units.split(counts), strict=True)
        ]
        on_device = units.to(device, non_blocking=True).split(counts)
        return [Chosen(*each) for each in zip(table.groups, on_device, short, strict=True)]

    def scaled(self, chosen: Chosen, mean: Tensor) -> Tensor:
        """See :class:`Selection`; times the units of each group, unless these take turns."""
        if self.in_turn:
            return mean
        before = max(chosen.groups.number - 1, 0) * _RUN
        mean[:before].mul_(self.size)
        mean[before:].mul_(chosen.groups.last)
        return mean


class _Table(NamedTuple):
    """The groups of some tensors."""

    groups: Sequence[Groups]
    numbers: Array
    """Of the groups in their tensor."""
    firsts: Array
    """First units of the groups."""
    sizes: Array
    """Units of the groups."""


@functools.lru_cache(maxsize=256)  # the same tensors are exchanged in each step
def _table(numels: tuple[int, ...], size: int) -> _Table:
    groups = [Groups(numel, _RUN, size) for numel in numels]
    numbers = np.concatenate([np.arange(each.number) for each in groups])
    sizes = np.full(len(numbers), size, np.uint64)
    filled = [each for each in groups if each.number]
    sizes[np.cumsum([each.number for each in filled], dtype=np.int64) - 1] = [
        each.last for each in filled
    ]
    return _Table(groups, numbers.astype(np.uint64), numbers * size, sizes)
