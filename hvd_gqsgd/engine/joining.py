"""Small tensors that go together, where they come faster than one after the other can be exchanged.

A small tensor waits while others are being exchanged, and those that wait go together then. All
ranks hand in the same tensors in one order, but how many wait differs between them. So each rank
tells, in the header of an exchange, how many wait behind it, and as many as wait on all ranks go
next. Where none waits here, one goes next, and there is no need to hear of the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Joined", "Joining"]

T = TypeVar("T")


@dataclass(frozen=True)
class Joined(Generic[T]):
    """Tensors that go together."""

    members: list[T]
    small: bool
    behind: int
    """How many wait behind them, to tell the other ranks."""


class Joining(Generic[T]):
    """The tensors that wait, in the order that all ranks have.

    Args:
        most: bytes that go together; a tensor is small if it has a quarter of them or less.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # With its kind, if it is small, and its bytes.
        self._waiting: deque[tuple[T, Hashable | None, int]] = deque()
        self._count: int | None = 1  # that go next; None: not known yet

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def undecided(self) -> bool:
        """Whether the next one waits for ``agree``."""
        return self._count is None

    def add(self, member: T, kind: Hashable | None, nbytes: int) -> None:
        """Adds a tensor; those of one kind may go together. None: it goes on its own, at once."""
        self._waiting.append((member, kind if 4 * nbytes <= self._most else None, nbytes))

    def take(self, in_flight: Collection[Joined[T]]) -> Joined[T] | None:
        """Removes the tensors that go next; None if they must wait.

        Args:
            in_flight: those that were taken before and are not done.
        """
        if not self._waiting or self._count is None:
            return None
        small = self._waiting[0][1] is not None
        # An exchange that fails ends all of those in flight, which must be the same on all ranks:
        # several go together only once those before them went well.
        if in_flight if self._count > 1 else small and any(each.small for each in in_flight):
            return None
        members = [self._waiting.popleft()[0] for _ in range(self._count)]
        behind = self._ready() if small else 0
        self._count = None if behind else 1
        return Joined(members, small, behind)

    def agree(self, behind: int) -> None:
        """Takes over the least ``behind`` of all ranks, for those taken last."""
        self._count = max(behind, 1)

    def restart(self) -> list[T]:
        """Removes all tensors; the next one goes on its own."""
        left = [member for member, _, _ in self._waiting]
        self._waiting.clear()
        self._count = 1
        return left

    def _ready(self) -> int:
        """How many could go together; 0 if fewer than two."""
        count = total = 0
        for _, kind, nbytes in self._waiting:
            total += nbytes
            if kind is None or kind != self._waiting[0][1] or total > self._most:
                break
            count += 1
        return count if count > 1 else 0
