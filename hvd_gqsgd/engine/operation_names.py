"""Names of messages: which number a pipeline has among those that are in use."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvd_gqsgd.engine.pipeline import Pipeline

__all__ = ["Namespace"]


class Namespace:
    """Numbers the pipelines that have tickets out, so that no two messages share a name.

    A pipeline is numbered anew with each step, by what is in use then: a number kept for good would
    differ between ranks for good once one of them had used a pipeline that another one had not.

    Args:
        label: begins the names of all messages; the same on all ranks.
    """

    def __init__(self, label: str = "gqsgd") -> None:
        self.label = label
        self.failures = 0
        """Steps that were abandoned: messages of later ones have other names."""
        self.unfinished: set[Pipeline] = set()
        """Pipelines with messages out; held here, for messages outlive whoever drops a pipeline."""
        self._session: object = None
        self._pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()
        # Of each pipeline that joined: the steps that the others were in then.
        self._seen: weakref.WeakKeyDictionary[Pipeline, set[tuple[int, int]]] = (
            weakref.WeakKeyDictionary()
        )

    def renew(self, session: object) -> None:
        """Starts over if the transport did."""
        if session is not self._session:
            self._session = session
            self.failures = 0
            for pipeline in list(self._pipelines):
                pipeline.forget()

    def prefix(self, number: int) -> str:
        """Begins the names of messages of the pipeline with this number."""
        return f"{self.label}.{number}.{self.failures}"

    def join(self, pipeline: Pipeline) -> int:
        """The smallest number that no other pipeline with tickets out has."""
        self._pipelines.add(pipeline)
        self._collect(pipeline)
        for other in list(self.unfinished):
            if other is not pipeline and not other.active:
                other.give_up()  # its names must not come up again
        taken = {p.number for p in self._pipelines if p is not pipeline and p.active}
        return next(number for number in itertools.count() if number not in taken)

    def _collect(self, pipeline: Pipeline) -> None:
        """Frees tickets that nobody can reach, as those of an optimizer that an exception ended.

        It is in a cycle with its hooks, which each rank would free at another time; until then the
        pipeline would have a number there. The search takes long, so it is made only where a
        pipeline is new, or finds another one in the very step in which it was the last time.
        """
        others = {(id(p), p.stats.steps) for p in self._pipelines if p is not pipeline and p.active}
        if others & self._seen.get(pipeline, others):
            gc.collect()
        self._seen[pipeline] = others
