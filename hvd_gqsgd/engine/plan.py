"""Which named tensors travel together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from hvd_gqsgd.engine.buckets import Kind

__all__ = ["BucketPlan"]


@dataclass(frozen=True)
class BucketPlan:
    """Buckets made up front of tensors with names, so that these may come in any order."""

    places: dict[Hashable, tuple[int, int]]
    """Bucket number and position of each name."""
    sizes: Sequence[int]
    """How many tensors each bucket waits for."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[Hashable, Kind, int]], bucket_bytes: int) -> BucketPlan:
        """From (name, kind, bytes) in the order in which gradients are expected."""
        places: dict[Hashable, tuple[int, int]] = {}
        sizes: list[int] = []
        filling: dict[Kind, tuple[int, int]] = {}  # bucket number and bytes so far
        for position, (name, kind, nbytes) in enumerate(tensors):
            if kind not in filling:
                filling[kind] = (len(sizes), 0)
                sizes.append(0)
            number, total = filling[kind]
            places[name] = (number, position)
            sizes[number] += 1
            if total + nbytes >= bucket_bytes:
                del filling[kind]
            else:
                filling[kind] = (number, total + nbytes)
        return cls(places, sizes)
