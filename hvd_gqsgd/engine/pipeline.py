"""Buckets in flight: norms out, codes out, gradient back. Knows no transport from another.

A tensor is handed in by ``submit`` and joins a bucket. A full bucket starts the first collective of
its exchange, the Max of its block norms, and is left alone; a later ``submit`` finds the norms
reduced, rounds the tensors to codes on them and starts the next collective. ``wait`` returns when
the last one is done, and ``decode`` makes the gradient. Nothing before ``wait`` blocks, and nothing
before ``wait`` raises for what another rank did: every rank must come to the point where all of
them learn of it.

**Steps.** A step begins with the first ``submit`` after all earlier tickets were decoded or
dropped. Numbers that ranks must share (names of messages, dither) count from the start of the step,
so that a rank which lost a step, or joined later, falls in line with the next one. The step number
itself is the largest of all ranks', carried by the norms.

**Turns.** When a collective is done differs from rank to rank, but transports want every rank to
start its operations of one kind in one order, and Horovod names what its users leave unnamed by
counting the operations started so far. So a bucket goes to its next collective only after the one
before it did, and at fixed points only: each full bucket brings some turns, right after its norms
were sent off, to start a collective of an earlier one or to pass. Turns that were not passed are
made up for in ``wait``, where the remaining collectives are started too. So wherever the user's
code runs, all ranks have started the same number of operations.
"""

from __future__ import annotations

import math
import time
import weakref
from typing import Any

from torch import Tensor

from hvd_gqsgd.engine.bucketing import Filling
from hvd_gqsgd.engine.buckets import Bucket, Contribution, Item
from hvd_gqsgd.engine.buffer_pool import BufferPool
from hvd_gqsgd.engine.operation_names import Namespace
from hvd_gqsgd.engine.operation_slots import Turns, reaped
from hvd_gqsgd.engine.plan import BucketPlan
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.engine.streams import Streams, hand_out, on
from hvd_gqsgd.errors import AgreementError, RankLeftError
from hvd_gqsgd.exchanges import Exchange, make_exchange
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Handle, Transport

__all__ = ["Pipeline", "Ticket"]


class Ticket:
    """A tensor on its way. Dropping it is how to say that its result is not wanted any more."""

    __slots__ = ("__weakref__", "bucket", "item")

    def __init__(self, bucket: Bucket, item: Item) -> None:
        self.bucket = bucket
        self.item = item


class Pipeline:
    """One rank's exchange of many tensors.

    Args:
        options: the same on all ranks.
        transport: what moves the bytes.
        namespace: shared by pipelines of this process whose messages could be mixed up.
        plan: buckets of tensors with names; without one, and for tensors without a name, buckets
            fill in order of arrival.
        step: number of the first step.
        stats: where to count.
        ahead: what ranks must agree on goes ahead of all else; see ``Exchange``. Then all ranks
            must hand in their tensors in one order.
    """

    def __init__(
        self,
        options: Options,
        transport: Transport,
        *,
        namespace: Namespace | None = None,
        plan: BucketPlan | None = None,
        step: int = 0,
        stats: Stats | None = None,
        ahead: bool = False,
    ) -> None:
        self.options = options
        self.stats = stats or Stats()
        self._transport = transport
        self._namespace = namespace or Namespace()
        self._ahead = ahead
        self._open_ended = False  # the step lasts until the next one is begun
        self._pool = BufferPool()
        # NCCL takes the operations of a communicator one after the other anyway.
        streams = Streams(4 if transport.nccl is None else 1)
        self._filling = Filling(options.bucket_bytes, plan, streams)
        self._session: object = None
        self._steps = Steps(options.bits, step)
        self._live: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._in_flight: list[Bucket] = []
        self._orphans: list[Handle] = []
        self._sent = 0  # tensors whose norms were sent off and that are not decoded
        self.number = 0  # of the step, from the namespace
        self._exchange: Exchange | None = None
        self._done_its_part = False
        self._turns = Turns(transport, self.stats)

    @property
    def active(self) -> bool:
        """Whether a ticket is neither decoded nor dropped."""
        return bool(self._live)

    def begin_step(self, step: int | None = None) -> None:
        """Begins a step that lasts until the next call, however many tickets are decoded in it.

        Args:
            step: its number, unless another rank has a larger one; None: one more than the last.

        Raises:
            ValueError: the lanes are too narrow for the number of ranks.
        """
        self._open_ended = True
        self._begin_step(step)

    def submit(
        self,
        x: Tensor,
        name: str | None = None,
        *,
        scale: float | None = None,
        out: Tensor | None = None,
    ) -> Ticket:
        """Hands in a flat, contiguous tensor, which must stay as it is until it is decoded.

        Args:
            x: the tensor.
            name: the same on all ranks, for tensors that come in another order there.
            scale: that of ``decode``, if it is known already; the same on all ranks.
            out: flat and contiguous memory to decode to, maybe ``x`` itself.

        Raises:
            ValueError: the lanes are too narrow for the number of ranks.
        """
        new_session = self._transport.session is not self._session
        if new_session or not (self.active or self._open_ended):
            self._begin_step()
        assert self._exchange is not None
        self._exchange.check(x.numel())
        self._done_its_part = False

        bucket, item, full = self._filling.add(x, name, scale, out, self._prefix())
        ticket = Ticket(bucket, item)
        self._live.add(ticket)
        if full:
            self._launch(bucket)
            # With just as many turns as there are collectives to start, one that was late once
            # would hold up all later ones.
            for _ in range(0 if self._ahead else len(self._exchange.stages)):
                self._take_turn()
        return ticket

    def flush(self) -> None:
        """Starts the buckets that are not full."""
        for bucket in self._filling.take_all():
            self._launch(bucket)

    def advance(self) -> bool:
        """Starts the collectives that can be; whether there are none left to start."""
        while (bucket := self._due()) is not None:
            self._advance(bucket)
        return all(self._is_last(bucket) for bucket in self._in_flight)

    def wait(self, ticket: Ticket, patience: float | None = None) -> Contribution | None:
        """Waits for the end of a tensor's exchange and tells which ranks took part.

        With ``patience``, returns None if it has not come after so many seconds.

        Raises:
            AgreementError: ranks disagree on the options or on the tensors of a bucket.
            RuntimeError: the ticket was decoded or given up before.
            Exception: whatever the transport raised.
        """
        began = time.monotonic()
        self.flush()
        while (contribution := self.poll(ticket)) is None:
            # A look at the handles alone is cheaper than a poll, and a core may be short.
            pending = [bucket.handle for bucket in self._in_flight if bucket.handle is not None]
            while True:
                waited = time.monotonic() - began
                if patience is not None and waited > patience:
                    return None
                self._transport.idle(waited)
                if not pending or any(handle.done() for handle in pending):
                    break
        return contribution

    def poll(self, ticket: Ticket) -> Contribution | None:
        """What ``wait`` returns, once it is there; None before that. Its bucket must have been
        started, as by ``flush``.

        Raises:
            Exception: as ``wait``.
        """
        if self._arrived(ticket.bucket):
            self._done_its_part = True
            return ticket.bucket.contribution
        failure = next((b.failure for b in self._in_flight if b.failure is not None), None)
        if isinstance(failure, AgreementError):
            self.abandon(counted=not isinstance(failure, RankLeftError))
        if failure is not None:
            self.forget()
            raise failure
        if ticket not in self._live:
            raise RuntimeError(
                f"{ticket.bucket.name} is not in flight here: it was decoded before, given up "
                "after an error, or is another compressor's"
            )
        return None

    def decode(self, ticket: Ticket, scale: float) -> Tensor:
        """``scale`` times the sum over the ranks, flat. Once a ticket, and after ``wait``."""
        bucket, item = ticket.bucket, ticket.item
        if ticket not in self._live:
            raise RuntimeError(f"a tensor of {bucket.name} was decoded or given up before")
        assert self._exchange is not None and bucket.contribution is not None
        with on(bucket.stream):
            out = item.out
            if out is None:
                out = self._pool.take(item.numel, item.dtype, item.device)
            self._exchange.decode(bucket, item, out, scale)
            self._steps.decoded(out)
        hand_out(out, bucket.stream)
        item.x = item.out = None
        bucket.undecoded -= 1
        if not bucket.undecoded:
            bucket.release()
        self._live.discard(ticket)
        self._sent -= 1
        if not self._sent:
            self._namespace.unfinished.discard(self)
        return out

    def state_dict(self) -> dict[str, Any]:
        """The number of the next step, and the state of the bit width's schedule."""
        self._learn()
        return self._steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there with the next step.

        Raises:
            TypeError, ValueError: it is not what ``state_dict`` gives.
            RuntimeError: tensors are in flight.
        """
        if self._transport.session is not self._session:
            self.forget()  # whoever holds a ticket of another session, as in an exception's frames
        if self.active:
            raise RuntimeError("a state cannot be loaded while gradients are in flight")
        self._steps.load_state_dict(state)

    def abandon(self, counted: bool = True) -> None:
        """Ends the step for all its tickets, after an error that all ranks come to see.

        Later messages get other names, as some of this step may stay in flight for ever. Not
        ``counted`` is an error of which a rank cannot know that will be back: names stay the same,
        and what is in flight is waited for, as the ranks that see the error have all started it.

        Explicit, so that it does not hang on when each rank frees the tickets: an exception's
        traceback may keep them for long. Collectives that other ranks may have started are started
        here too, whatever is in their messages, or they would be in flight for ever. (Not if the
        ranks had to agree ahead: then the others have seen the same and started no more.)
        """
        last = len(self._exchange.stages) - 1 if self._exchange else 0
        for bucket in self._in_flight:
            assert self._exchange is not None
            if bucket.failure is not None:  # on all ranks: none has taken a bucket beyond this
                last = min(last, bucket.stage)
            if not self._ahead:
                self._turns.taken += len(self._exchange.stages) - 1 - max(last, bucket.stage)
                self._orphans += self._exchange.start_rest(bucket, last)
        self._turns.make_up(self._prefix())
        if counted:
            self._namespace.failures += 1
        else:
            handles = [bucket.handle for bucket in self._in_flight if bucket.handle is not None]
            while not (all(handle.done() for handle in handles) and self._turns.done()):
                self._transport.idle()
        self.forget()

    def give_up(self) -> None:
        """Ends a step whose tickets were dropped here, of which other ranks may know nothing.

        A rank that has waited since its last tensor has done its part, and the others can complete
        the step. Otherwise it starts whatever they may be waiting for, in a way that tells them
        that the step is lost, and counts the failure that they will count.
        """
        if self._sent and not self._done_its_part:
            self.flush()
            self.abandon()
        self.forget()

    def forget(self) -> None:
        """Ends the step for all its tickets and sends nothing."""
        for bucket in (*self._filling.take_all(), *self._in_flight):
            if bucket.handle is not None:
                self._orphans.append(bucket.handle)
            bucket.abandon()
        self._orphans += self._turns.begin_step()
        self._in_flight.clear()
        self._live.clear()
        self._sent = 0
        self._steps.forget()  # it has seen a part of the gradient, if anything
        self._namespace.unfinished.discard(self)

    def _begin_step(self, step: int | None = None) -> None:
        """Leaves behind whatever was not decoded, and counts from the start again."""
        self._learn()
        session = self._transport.session
        self._namespace.renew(session)
        if session is not self._session:
            self._session = session
            self.forget()
            self._orphans.clear()  # handles of another session mean nothing in this one
            self._exchange = None
        self.give_up()
        self._orphans = [handle for handle in self._orphans if not reaped(handle)]
        self._filling.begin_step()
        self._pool.next_step()
        rank, size = self._transport.rank, self._transport.size
        if self._exchange is None or (self._exchange.rank, self._exchange.size) != (rank, size):
            self._exchange = make_exchange(
                self.options, self._transport, self._pool, self.stats, self._ahead
            )
        self.number = self._namespace.join(self)
        self._exchange.begin_step(self._steps.propose(self._exchange.summands, step))
        self.stats.steps += 1

    def _learn(self) -> None:
        """Tells the schedule of the bit width how the step before was, if it was completed."""
        if not (self._sent or self._filling):
            self._steps.learn()

    def _launch(self, bucket: Bucket) -> None:
        """Takes this rank's norms of a bucket and starts their maximum."""
        assert self._exchange is not None
        self.stats.compressed_bytes_before += bucket.nbytes
        self.stats.elements += sum(item.numel for item in bucket.items)
        self._in_flight.append(bucket)
        self._sent += len(bucket.items)
        self._namespace.unfinished.add(self)
        self._exchange.launch(bucket)

    def _prefix(self) -> str:
        return self._namespace.prefix(self.number)

    def _take_turn(self) -> None:
        """Starts one collective if it can be, and passes otherwise."""
        self._turns.taken += 1
        bucket = self._due()
        if bucket is None or not self._advance(bucket):
            self._turns.pass_(self._prefix())

    def _due(self) -> Bucket | None:
        """The oldest bucket whose next collective can be started now."""
        ahead = math.inf
        for bucket in self._in_flight:
            if (
                bucket.stage < ahead
                and not self._is_last(bucket)
                and bucket.failure is None
                and bucket.handle is not None
                and bucket.handle.done()
            ):
                return bucket
            ahead = bucket.stage
        return None

    def _is_last(self, bucket: Bucket) -> bool:
        """Whether a bucket is in its last collective."""
        assert self._exchange is not None
        return bucket.stage == len(self._exchange.stages) - 1

    def _arrived(self, bucket: Bucket) -> bool:
        """Whether a bucket is done, with all collectives started and all turns passed."""
        if not self.advance():
            return False
        self._turns.make_up(self._prefix())
        for other in list(self._in_flight):
            if other.failure is None and other.handle is not None and other.handle.done():
                self._advance(other)
        return self._turns.done() and bucket.contribution is not None

    def _advance(self, bucket: Bucket) -> bool:
        """Takes a bucket whose collective is done one stage further; whether that went well."""
        assert self._exchange is not None
        try:
            before = bucket.stage
            self._exchange.advance(bucket)
            if before == 0:
                self._settle(bucket)
        except Exception as error:
            # Kept for wait(): raised here, in the middle of one rank's backward pass, it would
            # leave the others waiting for tensors that never come.
            bucket.failure = error
            return False
        if bucket.contribution is not None:
            self._in_flight.remove(bucket)
        return True

    def _settle(self, bucket: Bucket) -> None:
        """Takes over what the ranks have settled on with the norms of a bucket."""
        assert bucket.agreement is not None
        self._steps.settle(bucket.agreement)
        self.stats.bits = bucket.agreement.bits
