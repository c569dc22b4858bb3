"""Names of operations: the number of a pipeline among those that have messages out."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Protocol

__all__ = ["Named", "OperationNames"]


class Named(Protocol):
    """A pipeline, as ``OperationNames`` sees it."""

    number: int

    @property
    def active(self) -> bool:
        """Whether a ticket is neither decoded nor dropped."""

    @property
    def steps_begun(self) -> int:
        """How many steps it has begun."""

    @property
    def in_flight(self) -> int:
        """How many buckets and operations are not complete."""

    def give_up(self) -> None:
        """Ends a step whose tickets were dropped."""

    def restart(self) -> None:
        """Ends a step whose session has ended."""


class OperationNames:
    """Numbers the pipelines that have tickets out, so that no two messages share a name.

    A pipeline is numbered anew with each step, by the numbers in use then: a number kept for good
    would differ between ranks for good once one of them had used a pipeline that another one had
    not.

    Args:
        label: begins the names of all operations; the same on all ranks.
    """

    def __init__(self, label: str = "gqsgd") -> None:
        self.label = label
        self.failures = 0
        """Steps after which operations got new names."""
        self.unfinished: set[Named] = set()
        """Pipelines with messages out; held here, for messages outlive references to a pipeline."""
        self._session: object = None
        self._pipelines: weakref.WeakSet[Named] = weakref.WeakSet()
        # Of each pipeline that joined: the steps that the others were in then.
        self._seen: weakref.WeakKeyDictionary[Named, set[tuple[int, int]]] = (
            weakref.WeakKeyDictionary()
        )

    def renew(self, session: object) -> None:
        """Starts over if the transport did."""
        if session is not self._session:
            self._session = session
            self.failures = 0
            for pipeline in list(self._pipelines):
                pipeline.restart()

    def prefix(self, number: int) -> str:
        """Begins the names of operations of the pipeline with this number."""
        return f"{self.label}.{number}.{self.failures}"

    @property
    def pipelines(self) -> list[Named]:
        """The pipelines that have joined and still exist."""
        return list(self._pipelines)

    def complete_dropped_steps(self) -> None:
        """Ends steps whose tickets were dropped, so that no other rank waits for them."""
        for pipeline in list(self.unfinished):
            if not pipeline.active:
                pipeline.give_up()

    def join(self, pipeline: Named) -> int:
        """The smallest number that no other pipeline with tickets out has."""
        self._pipelines.add(pipeline)
        self._collect(pipeline)
        self.complete_dropped_steps()  # their names must not come up again
        taken = {p.number for p in self._pipelines if p is not pipeline and p.active}
        return next(number for number in itertools.count() if number not in taken)

    def _collect(self, pipeline: Named) -> None:
        """Frees unreachable tickets, as those of an optimizer that an exception ended.

        The optimizer is in a cycle with its hooks, which each rank would free at another time;
        until then its pipeline would have a number there. A collection takes long, so it runs only
        where a pipeline is new, or finds another one in the very step of the time before.
        """
        others = {(id(p), p.steps_begun) for p in self._pipelines if p is not pipeline and p.active}
        if others & self._seen.get(pipeline, others):
            gc.collect()
        self._seen[pipeline] = others
