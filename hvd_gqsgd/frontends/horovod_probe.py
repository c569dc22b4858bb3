"""The probe: a small tensor that Horovod reduces in place of the gradient.

A compressor receives neither the name of the tensor, the reduction, the scale factors, nor the
process set. Horovod applies all of these to the probe, as to a gradient. The reduced probe reveals
the requested reduction, and whether all ranks requested the same. Slots, in float64:

    0       1
    1, 2    two numbers of the rank
    3, 4    a, a^2    12 bits of the tensor's identity, and their square
    5, 6    b, b^2    12 bits more

For a linear reduction, slot 0 comes back as factor * contributors, and 1 and 2 as the factor times
sums that the payload of the exchange, which is always summed, gives exactly. All ranks have the
same identity if and only if the variance of a and of b over the ranks is zero. Every rank sees the
same slots and so comes to the same verdict.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.engine.agreement import ORDER
from hvd_gqsgd.errors import GAVE_UP
from hvd_gqsgd.exchanges.contribution import Contribution, rank_weight
from hvd_gqsgd.options import digest

__all__ = ["PROBE_BYTES", "Reading", "disagreement", "identity_of", "make_probe"]

PROBE_BYTES = 7 * 8

# Float64 sums of integers below 2^24 over up to 10,000 ranks, times a few scale factors, are right
# to 1e-14; a rank with another identity changes the variance by 1/(ranks * 2^24) at the least.
RTOL = 1e-12


@functools.lru_cache(maxsize=2**15)  # the same tensors come step after step
def identity_of(tensor: int, shape: tuple[int, ...], bucket: str) -> int:
    """31 bits that tell tensors of other shapes apart too, and those in buckets of other names,
    which do not meet."""
    return digest((tensor, *shape, bucket))


def make_probe(rank: int, identity: int) -> Tensor:
    """This rank's probe for a tensor with a 31-bit identity: float64, 7 elements, on the CPU."""
    return _template(rank, identity).clone()


@functools.lru_cache(maxsize=2**15)
def _template(rank: int, identity: int) -> Tensor:
    a, b = identity & 0xFFF, identity >> 12 & 0xFFF
    slots = [1, rank, rank_weight(rank), a, a * a, b, b * b]
    return torch.tensor(slots, dtype=torch.float64, device="cpu")


class Reading(NamedTuple):
    """A reduced probe."""

    slots: tuple[float, ...]

    @classmethod
    def of(cls, probe: Tensor) -> Reading:
        """Reads a reduced probe."""
        return cls(tuple(probe.tolist()))

    @functools.lru_cache(maxsize=2**15)  # noqa: B019 (numbers alone, the same step after step)
    def complete(self, everyone: Contribution) -> bool:
        """Whether all ranks requested the same, supported reduction."""
        return self.matches(everyone) and self.same_tensor()

    def matches(self, contribution: Contribution) -> bool:
        """Whether the probe was reduced linearly over exactly these contributors."""
        one, rank, weight = self.slots[:3]
        return _close(rank * contribution.count, one * contribution.ranks) and _close(
            weight * contribution.count, one * contribution.weights
        )

    def same_tensor(self) -> bool:
        """Whether all contributors submitted the same tensor; for linear reductions."""
        one, _, _, a, aa, b, bb = self.slots
        return _close(one * aa, a * a) and _close(one * bb, b * b)

    def digest(self) -> int:
        """31 bits, the same on all ranks."""
        return digest(self.slots)

    @functools.lru_cache(maxsize=2**15)  # noqa: B019
    def scale(self, contributors: int, world_size: int) -> float:
        """Factor from the sum over the contributors to the requested result.

        The mean and the sum are by far the most common, and get exactly 1/world_size and 1.
        """
        scale = self.slots[0] / contributors
        for exact in (1 / world_size, 1.0):
            if _close(scale, exact):
                return exact
        return scale


def disagreement(reading: Reading, contribution: Contribution | None) -> str | None:
    """Returns the reason that no correct result exists, or None; the same on all ranks."""
    if contribution is not None and contribution.count < contribution.here:
        return GAVE_UP
    # A product may overflow.
    if not reading.same_tensor() and math.isfinite(sum(reading.slots)):
        return (
            "the ranks compress tensors of different shapes, types or order, or with options or "
            "names of parameters that need other messages, or a step was lost on "
            f"some ranks alone, as on those that had not left by hvd.join(); {ORDER}"
        )
    if contribution is None or not reading.matches(contribution):
        return (
            "GlobalQSGD needs a linear reduction (op=hvd.Average or hvd.Sum, with any scale "
            "factors) over the ranks of its process_set. Got another one: op=hvd.Min, Max, Product "
            "or Adasum, or a process_set that GlobalQSGD(process_set=...) was not given"
        )
    return None


def _close(a: float, b: float) -> bool:
    # An overflow is close to nothing.
    return abs(a - b) <= RTOL * max(abs(a), abs(b)) < math.inf
