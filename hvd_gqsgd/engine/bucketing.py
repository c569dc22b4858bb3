"""Which tensors travel together, and when a bucket is full."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item, Kind, kind_of
from hvd_gqsgd.engine.streams import Streams, hand_in
from hvd_gqsgd.options import digest

__all__ = ["AS_FLUSHED", "BucketPlan", "Filling"]


@dataclass(frozen=True)
class BucketPlan:
    """Buckets made up front of tensors with names, so that these may come in any order."""

    places: dict[Hashable, tuple[int, int]]
    """Bucket number and position of each name."""
    sizes: Sequence[int]
    """How many tensors each bucket waits for."""
    splits: bool = True
    """Whether a bucket of tensors without a place is full with so many bytes."""

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


AS_FLUSHED = BucketPlan({}, [], splits=False)
"""Tensors of one kind travel together from flush to flush, however many."""


@functools.lru_cache(maxsize=2**15)  # the same tensors come step after step
def _identity(label: Hashable, repeat: int, numel: int, dtype: torch.dtype) -> int:
    """31 bits that identify a tensor on all ranks."""
    return digest((label, repeat, numel, str(dtype)))


class Filling:
    """The buckets of a step that are not full.

    Args:
        bucket_bytes: a bucket without a plan is full with so many.
        plan: buckets of tensors with names; without one, and for tensors without a name, buckets
            fill in order of arrival.
        streams: for the work on buckets on a GPU.
    """

    def __init__(self, bucket_bytes: int, plan: BucketPlan | None, streams: Streams) -> None:
        self._bucket_bytes = bucket_bytes
        self._plan = plan or BucketPlan({}, [])
        self._streams = streams
        self._open: dict[Hashable, Bucket] = {}
        self.begin_step()

    def __len__(self) -> int:
        return len(self._open)

    def begin_step(self) -> None:
        """Counts from zero."""
        self._arrivals, self._positions = itertools.count(), itertools.count()
        self._repeats: Counter[Hashable] = Counter()
        self._opened: Counter[str] = Counter()

    def add(
        self,
        x: Tensor,
        name: str | None,
        scale: float | None,
        out: Tensor | None,
        prefix: Callable[[], str],
    ) -> tuple[Bucket, Item, bool]:
        """Adds a tensor to its bucket, and tells whether the bucket is full; then it is removed.

        Args:
            x, name, scale, out: as for ``Pipeline.submit``.
            prefix: begins the bucket's name, if it is a new one.
        """
        if name is None:
            identity = _identity(next(self._arrivals), 0, x.numel(), x.dtype)
        else:
            identity = _identity(name, self._repeats[name], x.numel(), x.dtype)
            self._repeats[name] += 1
        kind = kind_of(x.dtype, x.device)
        planned = self._plan.places.get(name)
        key: Hashable
        if planned is not None:
            key, position = planned
            group = f"planned{key}."
        else:
            key, position, group = kind, next(self._positions), ""

        if key not in self._open:
            # Named the same whatever tensors another rank has: the two meet, and it is told what
            # differs.
            stream = self._streams.take(x.device, self._opened.total())
            self._open[key] = Bucket(f"{prefix()}.{group}{self._opened[group]}", kind, stream)
            self._opened[group] += 1
        bucket = self._open[key]
        item = Item(x, position, identity, scale, out)
        hand_in(x, bucket.stream)
        bucket.add(item)

        if planned is not None:
            full = len(bucket.items) == self._plan.sizes[planned[0]]
        else:
            full = self._plan.splits and bucket.nbytes >= self._bucket_bytes
        if full:
            del self._open[key]
        return bucket, item, full

    def take_all(self) -> Iterator[Bucket]:
        """Removes the buckets that are not full, one after the other."""
        while self._open:
            yield self._open.pop(next(iter(self._open)))
