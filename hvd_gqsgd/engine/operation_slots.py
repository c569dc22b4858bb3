"""Operation slots: points of the program at which every rank starts one operation.

Ranks see the end of a collective at different times, but Horovod names unnamed operations by
counting the operations started so far. So a collective is started in a slot only, and a rank
that has none to start fills the slot with a small operation. A slot that was used is made up for by
a filling at the end, so that all ranks have started as many collectives and filled as many slots.

Horovod alone counts operations. For other transports there are no slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Handle

__all__ = ["OperationSlots", "SlotFilling", "reaped"]


class SlotFilling(NamedTuple):
    """The operation that fills a slot."""

    start: Callable[[str], Handle]
    """Starts it, under a name."""
    nbytes: int


class OperationSlots:
    """The slots of one step of a pipeline.

    Args:
        filling: fills empty slots; None: there are no slots.
        stats: counts the bytes of fillings.
    """

    def __init__(self, filling: SlotFilling | None, stats: Stats) -> None:
        self._filling = filling
        self._stats = stats
        self._opened = 0
        self._filled = 0
        self._in_flight: list[Handle] = []

    @property
    def exist(self) -> bool:
        """Whether the transport counts operations."""
        return self._filling is not None

    def open(self, count: int) -> range:
        """Opens so many slots; each is to be used or filled."""
        slots = range(0 if self._filling is None else count)
        self._opened += len(slots)
        return slots

    def fill(self, prefix: str) -> None:
        """Fills a slot; ``prefix`` begins the name of the operation."""
        assert self._filling is not None
        self._in_flight.append(self._filling.start(f"{prefix}.pass.{self._filled}"))
        self._filled += 1
        self._stats.slots_filled += 1
        self._stats.compressed_bytes_on_wire += self._filling.nbytes

    def make_up(self, prefix: str) -> None:
        """Fills as many slots as were used."""
        while self._filled < self._opened:
            self.fill(prefix)

    def done(self) -> bool:
        """Whether all fillings are done."""
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.pop(0).wait()
        return not self._in_flight

    def begin_step(self) -> list[Handle]:
        """Counts from zero; returns the fillings still in flight."""
        orphans, self._in_flight = self._in_flight, []
        self._opened = self._filled = 0
        return orphans


def reaped(handle: Handle) -> bool:
    """Releases an abandoned operation, if it is done; returns whether it was."""
    if not handle.done():
        return False
    with contextlib.suppress(Exception):
        handle.wait()
    return True
