"""Turns: points of the program at which every rank starts one operation, and what it starts if
there is nothing to start.

A rank that had nothing at one turn passes, which counts like an operation where the transport
counts them. A turn that was used is made up for by a pass at the end, so that all ranks have
started as many collectives and passed as many turns.
"""

from __future__ import annotations

import contextlib

from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Handle, Transport

__all__ = ["Turns", "reaped"]


class Turns:
    """The turns of one step of a pipeline."""

    def __init__(self, transport: Transport, stats: Stats) -> None:
        self._transport = transport
        self._stats = stats
        self.taken = 0
        self.passed = 0
        self._in_flight: list[Handle] = []

    def pass_(self, prefix: str) -> None:
        """Passes a turn; ``prefix`` begins the name of what is sent."""
        self._in_flight.append(self._transport.pass_turn(f"{prefix}.pass.{self.passed}"))
        self.passed += 1
        self._stats.compressed_bytes_on_wire += self._transport.turn_bytes

    def make_up(self, prefix: str) -> None:
        """Passes all turns that were not passed when they came."""
        while self.passed < self.taken:
            self.pass_(prefix)

    def done(self) -> bool:
        """Whether all that was passed has gone through."""
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.pop(0).wait()
        return not self._in_flight

    def begin_step(self) -> list[Handle]:
        """Counts from the start; returns what is still in flight."""
        orphans, self._in_flight = self._in_flight, []
        self.taken = self.passed = 0
        return orphans


def reaped(handle: Handle) -> bool:
    """Clears away an operation that nobody waits for any more, if it is done."""
    if not handle.done():
        return False
    with contextlib.suppress(Exception):
        handle.wait()
    return True
