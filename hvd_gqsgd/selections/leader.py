"""A leader chooses: ScaleCom's cyclic local top-k (Chen et al., NeurIPS 2020, arXiv 2104.11125).

The ranks lead in turn, one in each exchange of a bucket. The leader takes the largest element of
each group of m, by the magnitude of the tensor that error feedback gives, as in the paper's
chunk-wise selection, and tells the others. All ranks send the elements at these places. The result
is biased; see ``feedback``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.selections.base import Chosen, Groups, Selection

__all__ = ["LeaderSelection"]


class LeaderSelection(Selection):
    """The largest element of each group, by the magnitudes of one rank."""

    unit = 1
    led = True

    @property
    def lane(self) -> torch.dtype:
        """Type of the place of a chosen element in its group."""
        return torch.uint8 if self.size <= 2**8 else torch.int16

    def leads(self, turn: int) -> bool:
        """Whether this rank leads in an exchange of some gradients, by the number of those
        before."""
        return turn % self.world_size == self.rank

    def words(self, numels: Sequence[int]) -> int:
        """Elements of the message, of int32, for tensors of so many elements."""
        places = sum(self.groups(numel).number for numel in numels)
        return -(-places * self.lane.itemsize // 4)

    def write(self, xs: Sequence[Tensor], message: Tensor) -> None:
        """Writes the places of the largest elements of ``xs`` to the message."""
        places = message.view(self.lane)
        counts = [self.groups(x.numel()).number for x in xs]
        for x, out in zip(xs, places.split([*counts, len(places) - sum(counts)]), strict=False):
            ops.block_argmax(x, self.size, out)

    def read(self, message: Tensor, numels: Sequence[int]) -> list[Chosen]:
        """The choice for each tensor, from the leader's message.

        Raises:
            AgreementError: a place is outside of its group.
        """
        groups = [self.groups(numel) for numel in numels]
        counts = [each.number for each in groups]
        places = message.view(self.lane)[: sum(counts)].to(torch.int64)
        places &= 256**self.lane.itemsize - 1  # int16 has a sign
        chosen = []
        for each, place in zip(groups, places.split(counts), strict=True):
            units = torch.arange(each.number, dtype=torch.int64, device=place.device)
            units = units.mul_(self.size).add_(place)
            self._check(each, place, units)
            chosen.append(Chosen(each, units))
        return chosen

    def _check(self, groups: Groups, places: Tensor, units: Tensor) -> None:
        if not groups.number:
            return
        low, high = places.aminmax()
        if int(high) >= self.size or int(units[-1]) >= groups.numel:
            raise AgreementError(
                f"the leader chose places {int(low)} to {int(high)} in groups of {self.size} "
                f"elements, the last of {groups.last}: a rank sent an invalid message"
            )
