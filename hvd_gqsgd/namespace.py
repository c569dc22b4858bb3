"""Names of messages: which number a pipeline has among those that are in use."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvd_gqsgd.pipeline import Pipeline

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

    def renew(self, session: object) -> None:
        """Starts over if the transport did."""
        if session is not self._session:
            self._session = session
            self.failures = 0
            for pipeline in list(self.unfinished):
                pipeline.forget()

    def prefix(self, number: int) -> str:
        """Begins the names of messages of the pipeline with this number."""
        return f"{self.label}.{number}.{self.failures}"

    def join(self, pipeline: Pipeline) -> int:
        """The smallest number that no other pipeline with tickets out has."""
        self._pipelines.add(pipeline)
        for other in list(self.unfinished):
            if other is not pipeline and not other.active:
                other.give_up()  # its names must not come up again
        taken = {p.number for p in self._pipelines if p is not pipeline and p.active}
        return next(number for number in itertools.count() if number not in taken)
