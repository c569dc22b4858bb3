"""The times of a training step on one rank, between the calls of a front end."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["StoppedWatch", "Stopwatch"]


class Stopwatch:
    """Measures steps in microseconds.

    A front end calls ``begin_step``, ``enter`` and ``leave`` around each gradient that is handed
    in, and ``result`` when a mean is handed out, in any thread.

    Args:
        clock: seconds, from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self._last_in = self._last_out = self._entered = now
        self._inside = self._left_out = 0.0

    def begin_step(self, began: float | None = None) -> tuple[int, int, int] | None:
        """Begins a step, and returns the times of the one before; None if there was none.

        Args:
            began: when it began, as the clock says; None: now.

        Returns:
            The time from the first gradient to the last mean; the part of it that the backward
            pass does not explain, which is the compressor's own time in the backward pass, and the
            time after the last gradient; and the time from step to step.
        """
        now = self._clock() if began is None else began
        began, self._began = self._began, now
        times = None
        if began is not None:
            after = max(self._last_out - self._last_in, 0.0)
            times = (
                max(1, int(1e6 * (max(self._last_out, self._last_in) - began))),
                max(1, int(1e6 * (self._inside + after))),
                max(1, int(1e6 * (now - began - self._left_out))),
            )
        self._reset(now)
        return times

    def enter(self) -> None:
        """The front end begins to work on a gradient."""
        self._entered = self._clock()

    def passed(self, last_in: float, last_out: float) -> None:
        """Gradients have passed on which the front end had no work.

        Args:
            last_in: when the last one was handed in, as the clock says; or 0.
            last_out: when the last mean was ready; or 0.
        """
        self._last_in = max(self._last_in, last_in)
        self._last_out = max(self._last_out, last_out)

    def leave(self) -> None:
        """The front end gives control back to the backward pass."""
        self._last_in = self._clock()
        self._inside += self._last_in - self._entered

    def leave_out(self, seconds: float) -> None:
        """Leaves a pause since the last mean out of the time from step to step."""
        self._left_out += seconds

    def result(self) -> None:
        """A mean is ready."""
        self._last_out = self._clock()


class StoppedWatch(Stopwatch):
    """Measures nothing, and reads no clock."""

    def begin_step(self, began: float | None = None) -> None:
        """Returns None."""

    def enter(self) -> None:
        """Does nothing."""

    leave = result = enter

    def passed(self, last_in: float, last_out: float) -> None:
        """Does nothing."""
