"""Flights without a result, by how many collectives each has started.

All ranks must start the collectives of one kind in one order, so that just the oldest flight of a
stage can go on to the next one.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

from hvd_gqsgd.engine.flight import Flight
from hvd_gqsgd.transports.base import Handle

__all__ = ["Stages"]


class Stages:
    """The flights of a step; older ones have started no less collectives than younger ones."""

    def __init__(self) -> None:
        self._by_started: defaultdict[int, dict[Flight, None]] = defaultdict(dict)
        self._failed = False  # one of them

    def __len__(self) -> int:
        return sum(map(len, self._by_started.values()))

    def launch(self, flight: Flight) -> None:
        """Adds a flight, and starts its first collective."""
        self._by_started[1][flight] = None
        flight.launch()

    def advance(self, flight: Flight) -> bool:
        """Takes a flight one collective further; returns whether that went well."""
        stage = self._by_started[flight.started]
        if not flight.advance():
            if flight.lost:
                del stage[flight]
                flight.abandon()
            else:
                self._failed = True
            return False
        del stage[flight]
        if flight.result is None:
            self._by_started[flight.started][flight] = None
        elif flight.lost:
            flight.abandon()
        return True

    def due(self, last: int) -> Flight | None:
        """The oldest flight that can go on, of those before their last collective."""
        for started in range(last - 1, 0, -1):
            flight = next(iter(self._by_started[started]), None)
            if flight is not None and flight.arrived:
                return flight
        return None

    def all_in(self, last: int) -> bool:
        """Whether all are in their last collective."""
        return not any(self._by_started[started] for started in range(1, last))

    def arrived_in(self, last: int) -> list[Flight]:
        """Those whose last collective is done."""
        return [flight for flight in self._by_started[last] if flight.arrived]

    def flights(self) -> list[Flight]:
        """All of them, the oldest first."""
        return [flight for n in sorted(self._by_started)[::-1] for flight in self._by_started[n]]

    def wait_for_one(self, idle: Callable[[float], None]) -> None:
        """Waits until a flight's collective is done, and takes it one further, unless one has
        failed. ``idle`` is called meanwhile, with the seconds since that began."""
        began = time.monotonic()
        while not self._failed:
            arrived = next((flight for flight in self.flights() if flight.arrived), None)
            if arrived is not None:
                self.advance(arrived)
                return
            idle(time.monotonic() - began)

    def handles(self) -> list[Handle]:
        """Of all collectives in flight."""
        return [flight.handle for flight in self.flights() if flight.handle is not None]

    def failed(self) -> Flight | None:
        """The oldest flight that has failed."""
        if not self._failed:
            return None
        return next((flight for flight in self.flights() if flight.failure is not None), None)

    def lose(self, go_on: bool) -> set[Flight]:
        """Removes or loses all flights at the end of a step.

        Args:
            go_on: flights without a failure stay, and run to their end before those of later steps.

        Returns:
            The flights that stay, those of earlier steps included.
        """
        for stage in self._by_started.values():
            for flight in list(stage):
                if flight.lost:
                    continue
                if go_on and flight.failure is None:
                    flight.lose()
                else:
                    del stage[flight]
        self._failed = False
        return set(self.flights())

    def clear(self) -> None:
        """Forgets all of them."""
        self._by_started.clear()
        self._failed = False
