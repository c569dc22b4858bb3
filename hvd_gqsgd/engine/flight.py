"""A bucket on its way through its collectives, and the tickets of its tensors."""

from __future__ import annotations

import math

from torch import Tensor

from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.engine.buffer_pool import BufferPool
from hvd_gqsgd.engine.failures import Ending
from hvd_gqsgd.engine.streams import on
from hvd_gqsgd.exchanges import Terms
from hvd_gqsgd.exchanges.base import Result, Running
from hvd_gqsgd.exchanges.collectives import Collective
from hvd_gqsgd.exchanges.contribution import Contribution
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Handle, Transport

__all__ = ["Flight", "Ticket"]


class Ticket:
    """A tensor on its way. Dropping it says that the result is not wanted any more."""

    __slots__ = ("__weakref__", "bucket", "item")

    def __init__(self, bucket: Bucket, item: Item) -> None:
        self.bucket = bucket
        self.item = item


class Flight:
    """A bucket, the collective that it is in, and its result or its failure in the end.

    Args:
        bucket: closed.
        running: its exchange, not started.
        terms: those of ``running``.
        transport: moves the messages.
        stats: counts them.
        counted: times that their bytes are counted.
    """

    def __init__(
        self,
        bucket: Bucket,
        running: Running,
        terms: Terms,
        transport: Transport,
        stats: Stats,
        counted: int,
    ) -> None:
        self.bucket = bucket
        self.started = 0
        """Collectives started so far."""
        self.handle: Handle | None = None
        """The one in flight."""
        self.result: Result | None = None
        self.failure: Exception | None = None
        self.contribution: Contribution | None = None
        """That of the result, once ``Pipeline.wait`` has returned it."""
        self.undecoded = len(bucket.items)
        self.lost = False
        """Whether its collectives run to their end for the other ranks alone; see ``lose``."""
        self._running = running
        self._terms = terms
        self._transport = transport
        self._stats = stats
        self._counted = counted
        self._sent: Collective | None = None
        self._scale = math.nan
        self._outs: dict[int, Tensor] | None = None
        """Decoded tensors by their place in the bucket, until they are asked for."""

    @property
    def arrived(self) -> bool:
        """Whether its collective in flight is done."""
        return self.failure is None and self.handle is not None and self.handle.done()

    @property
    def behind(self) -> int | None:
        """See ``Terms.behind``."""
        return self._terms.behind

    @property
    def ending(self) -> Ending:
        """How the step ends after ``failure``; one that the messages told the others ends it for
        them too."""
        assert self.failure is not None
        told = self.failure is self._terms.failure
        return Ending.DISAGREEMENT if told else Ending.of(self.failure)

    def lose(self) -> None:
        """Discards the result in advance; the remaining messages carry no meaning."""
        self.lost = self._terms.given_up = True

    def launch(self) -> None:
        """Starts the first collective."""
        with on(self.bucket.stream):
            self._start(next(self._running))

    def advance(self) -> bool:
        """Takes the result of the collective in flight to the next one, or to the end.

        Returns:
            Whether that went well. An error is kept as ``failure``: raised here, in the middle of
            one rank's backward pass, it would leave the others waiting for tensors that never come.
        """
        handle, self.handle = self.handle, None
        assert handle is not None
        try:
            with on(self.bucket.stream):
                self._start(self._running.send(handle.wait()))
        except StopIteration as done:
            self.result, self._sent = done.value, None
        except Exception as error:
            self.failure = error
            return False
        return True

    def give_up(self, last: int, all_here: bool) -> list[Handle]:
        """Starts the collectives up to number ``last``, with messages that mean nothing.

        Args:
            last: number of a collective.
            all_here: that of the step, which this bucket may not have been told.

        Returns:
            Those in flight, but for the last one, which is ``handle`` then.
        """
        self._terms.given_up, self._terms.all_here = True, all_here
        before = []
        with on(self.bucket.stream):
            while self.started < last and self._sent is not None:
                if self.handle is not None:
                    before.append(self.handle)
                self._start(self._running.send(self._sent.tensor))
        return before

    def decode(self, item: Item, scale: float, pool: BufferPool) -> Tensor:
        """``scale`` times the sum over the ranks of a tensor, once there is a result.

        The first call decodes all tensors of the bucket, as their scale is nearly always the same.
        """
        assert self.result is not None, "wait() comes before decode()"
        if item.out is not None:
            self.result.decode([item], [item.out], scale)
            return item.out
        if self._outs is None:
            items = [each for each in self.bucket.items if each.out is None]
            outs = pool.take_each([(each.shape, each.dtype, each.device) for each in items])
            self.result.decode(items, outs, scale)
            self._scale = scale
            self._outs = {each.place: out for each, out in zip(items, outs, strict=True)}
        if scale == self._scale:
            return self._outs.pop(item.place)
        (out,) = pool.take_each([(item.shape, item.dtype, item.device)])
        self.result.decode([item], [out], scale)
        return out

    def abandon(self) -> None:
        """Drops all references, also to an exception, whose traceback leads back here."""
        self._running.close()
        self.handle = self.failure = self.result = self._sent = self._outs = None
        self.bucket.items.clear()

    def _start(self, collective: Collective) -> None:
        self.started += 1  # before it is started, as that may call back at once
        self._sent = collective
        if collective.inside:
            self._stats.bytes_inside += collective.nbytes
        else:
            self._stats.compressed_bytes_on_wire += self._counted * collective.nbytes
        name = f"{self.bucket.name}.{collective.message}"
        self.handle = collective.start(self._transport, name)
