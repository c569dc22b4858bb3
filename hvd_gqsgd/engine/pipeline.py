"""Buckets in flight: tensors in, means out, over any transport.

A tensor is handed in by ``submit`` and joins a bucket. A full bucket starts the first collective of
its exchange and is left alone; a later ``submit`` finds the result, and starts the next collective.
``wait`` returns when the last one is done, and ``decode`` makes the gradient. Nothing before
``wait`` raises for an error of another rank: every rank must come to the point where all of them
learn of it. Nothing before ``wait`` blocks, but for others to come to a step that was dropped here.

A step begins with the first ``submit`` after all earlier tickets were decoded or dropped. Numbers
that ranks must share (names of messages, dither) count from its start, so that a rank which lost a
step, or joined later, falls in line. The step number itself is the largest of all ranks'.

Transports require every rank to start its operations of one kind in one order. So a bucket goes to
its next collective only after the one before it did. With operation slots it does so in a slot
only, or in ``wait``.
"""

from __future__ import annotations

import dataclasses
import time

from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.bucket import Bucket
from hvd_gqsgd.engine.agreement import Agreement, AgreementProtocol, WithNorms
from hvd_gqsgd.engine.bucketing import BucketPlan, Filling
from hvd_gqsgd.engine.buffer_pool import BufferPool
from hvd_gqsgd.engine.failures import Ending
from hvd_gqsgd.engine.flight import Flight, Ticket
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.engine.operation_slots import OperationSlots, SlotFilling, reaped
from hvd_gqsgd.engine.stages import Stages
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.engine.streams import Streams, hand_out, on
from hvd_gqsgd.engine.way import Way
from hvd_gqsgd.exchanges import Terms
from hvd_gqsgd.exchanges.contribution import Contribution
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Handle, Transport

__all__ = ["Pipeline"]


class Pipeline:
    """One rank's exchange of many tensors.

    Args:
        options: the same on all ranks.
        transport: moves the messages.
        protocol: how ranks agree. With ``Ahead`` all ranks must hand in tensors in one order.
        steps: the state of the training; None: a new one.
        names: shared by pipelines of this process whose messages could be mixed up.
        plan: buckets of tensors with names; the other buckets fill in order of arrival.
        slot_filling: for a transport that counts operations; see ``OperationSlots``.
        stats: counts messages and steps.
    """

    def __init__(
        self,
        options: Options,
        transport: Transport,
        *,
        protocol: type[AgreementProtocol] = WithNorms,
        steps: Steps | None = None,
        names: OperationNames | None = None,
        plan: BucketPlan | None = None,
        slot_filling: SlotFilling | None = None,
        stats: Stats | None = None,
    ) -> None:
        self.options = options
        self.stats = stats or Stats()
        self.steps = steps or Steps(options.width, feedback=options.error_feedback)
        self.number = 0
        """Of the step's messages, among the pipelines that share names."""
        self.steps_begun = 0
        self.rank = self.size = 0
        """This rank, and the number of ranks, since the step began."""
        self._transport = transport
        self._protocol_type = protocol
        self._names = names or OperationNames()
        self._open_ended = False  # the step lasts until the next one is begun
        self._pool = BufferPool()
        # NCCL takes the operations of a communicator one after the other anyway.
        self._filling = Filling(options.bucket_bytes, plan, Streams(1 if transport.nccl else 4))
        self._session: object = None
        self._record = self.steps.record()
        self._flights: dict[Bucket, Flight] = {}  # not all decoded
        self._stages = Stages()  # of these, those without a result
        self._orphans: list[Handle] = []
        self._sent = 0  # tensors whose exchange was started and that are not decoded
        self._way_or_none: Way | None = None
        self._proposal = Agreement(0, 0, ())
        self._all_here: bool | None = True  # None: a first message of the step will tell
        self._done_its_part = False
        self._slots = OperationSlots(slot_filling, self.stats)

    @property
    def active(self) -> bool:
        """Whether a ticket is neither decoded nor dropped."""
        return bool(self._record.tickets)

    @property
    def alone(self) -> bool:
        """Whether nothing is sent, as there is one rank."""
        return self._way.exchange.alone

    def describe(self) -> str:
        """See ``Exchange.describe``."""
        return self._way.exchange.describe()

    @property
    def messages(self) -> tuple[str, ...]:
        """The collectives of a bucket, by the last parts of their names.

        Raises:
            ValueError: the options leave no levels to this many ranks.
        """
        return self._way.messages

    @property
    def in_flight(self) -> int:
        """Buckets without a result, and operations left over from earlier steps."""
        return len(self._filling) + len(self._stages) + len(self._orphans)

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
        """Hands in a contiguous tensor, which must not change until it is decoded.

        Args:
            x: the tensor.
            name: the same on all ranks, for tensors that come in another order there.
            scale: that of ``decode``, if it is known already; the same on all ranks.
            out: contiguous memory of its shape to decode to, possibly ``x`` itself; for an exchange
                that leaves each rank a shard, memory for that.

        Raises:
            ValueError: the lanes are too narrow for the ranks, or the tensor cannot be exchanged.
        """
        new_session = self._transport.session is not self._session
        if new_session or not (self.active or self._open_ended):
            self._begin_step()
        self._way.exchange.check(x.numel())
        self._done_its_part = False
        bucket, item, full = self._filling.add(x, name, scale, out, self._prefix)
        ticket = Ticket(bucket, item)
        self._record.submitted(ticket)
        if full:
            self._launch(bucket)
            # With just as many slots as there are collectives to start, one that was late once
            # would hold up all later ones.
            for _ in self._slots.open(0 if self.alone else len(self._way.messages)):
                flight = self._stages.due(len(self._way.messages))
                if flight is None or not self._stages.advance(flight):
                    self._slots.fill(self._prefix())
        return ticket

    def flush(self, behind: int = 0) -> None:
        """Starts the buckets that are not full.

        Args:
            behind: how many tensors will be handed in next, for the other ranks to know.
        """
        for bucket in self._filling.take_all():
            self._launch(bucket, behind)

    def behind(self, ticket: Ticket) -> int | None:
        """The least ``behind`` that a rank has started the ticket's bucket with; None before that
        is known, and once the bucket was decoded."""
        flight = self._flights.get(ticket.bucket)
        return None if flight is None else flight.behind

    def advance(self) -> bool:
        """Starts the collectives that can be; returns whether none is left to start."""
        while (flight := self._stages.due(len(self._way.messages))) is not None:
            self._stages.advance(flight)
        return self._stages.all_in(len(self._way.messages))

    def wait(self, ticket: Ticket, patience: float | None = None) -> Contribution | None:
        """Waits for the end of a tensor's exchange.

        Returns:
            The ranks that took part; None after ``patience`` seconds.

        Raises:
            AgreementError: ranks disagree on the options or on the tensors of a bucket.
            RuntimeError: the ticket was decoded or given up before.
            Exception: an error of the transport.
        """
        known = self._flights.get(ticket.bucket)
        if known and known.contribution and ticket in self._record.tickets and not self._filling:
            return known.contribution  # as for another tensor of the bucket
        began = time.monotonic()
        self.flush()
        while (contribution := self.poll(ticket)) is None:
            # A look at the handles alone is cheaper than a poll, and a core may be short.
            pending = self._stages.handles()
            while True:
                waited = time.monotonic() - began
                if patience is not None and waited > patience:
                    return None
                self._transport.idle(waited)
                if not pending or any(handle.done() for handle in pending):
                    break
        return contribution

    def poll(self, ticket: Ticket) -> Contribution | None:
        """The result of ``wait``, or None. The bucket must have been started, as by ``flush``.

        Raises:
            Exception: as ``wait``.
        """
        if (contribution := self._arrived(ticket.bucket)) is not None:
            return contribution
        if (failed := self._stages.failed()) is not None:
            failure = failed.failure
            assert failure is not None
            self.end_step(failed.ending)
            raise failure
        if ticket not in self._record.tickets:
            raise RuntimeError(
                f"{ticket.bucket.name} is not in flight here: it was decoded before, abandoned "
                "after an error, or belongs to another compressor"
            )
        return None

    def decode(self, ticket: Ticket, scale: float) -> Tensor:
        """``scale`` times the sum over the ranks. Once a ticket, and after ``wait``."""
        bucket, item = ticket.bucket, ticket.item
        if ticket not in self._record.tickets:
            raise RuntimeError(f"a tensor of {bucket.name} was decoded or abandoned before")
        flight = self._flights[bucket]
        with on(bucket.stream):
            out = flight.decode(item, scale, self._pool)
            norm = ops.sum_of_squares(out) if self.steps.learns else None
        hand_out(out, bucket.stream)
        self._record.decoded(ticket, norm)
        item.release()
        flight.undecoded -= 1
        if not flight.undecoded:
            del self._flights[bucket]
        self._sent -= 1
        if not self._sent:
            self._names.unfinished.discard(self)
        return out

    def end_step(self, ending: Ending) -> None:
        """Ends the step for all its tickets; ``Ending`` says how.

        Explicit, so that it does not depend on when each rank frees the tickets: an exception's
        traceback may keep them for long.
        """
        if ending is Ending.GIVEN_UP:
            self.flush()  # other ranks may wait for these buckets too
            if self._all_here is None:
                self._stages.wait_for_one(self._transport.idle)
        if ending.starts_rest:
            self._start_rest()
            self._names.failures += 1
        # Where ranks agree ahead, they may be at different points of these buckets, and operations
        # match by order: the buckets run to their end, and their results are discarded.
        goes_on = ending is Ending.DISAGREEMENT and not self._protocol_type.may_give_up
        for flight in set(self._flights.values()) - self._stages.lose(goes_on):
            if flight.handle is not None:
                self._orphans.append(flight.handle)
            flight.abandon()
        for bucket in self._filling.take_all():
            bucket.items.clear()
        self._orphans += self._slots.begin_step()
        if ending is Ending.RESTARTED:
            self._orphans.clear()  # handles of another session mean nothing in this one
            self._way_or_none = None
            self._stages.clear()
        self._flights.clear()
        self._sent = 0
        self._record.forget()  # a part of the gradient teaches nothing
        self._names.unfinished.discard(self)

    def give_up(self) -> None:
        """Ends a step whose tickets were dropped here, of which other ranks may know nothing."""
        # A rank that has waited since its last tensor has done its part.
        started = self._sent and not self._done_its_part
        self.end_step(Ending.GIVEN_UP if started else Ending.DROPPED)

    def restart(self) -> None:
        """Ends the step if it is one of a session that has ended."""
        if self._transport.session is not self._session:
            self.end_step(Ending.RESTARTED)

    def _begin_step(self, step: int | None = None) -> None:
        """Leaves behind all that was not decoded, and counts from zero."""
        self.steps.learn(self._record)
        self._names.renew(self._transport.session)
        self.restart()
        self._session = self._transport.session
        self.give_up()
        self._orphans = [handle for handle in self._orphans if not reaped(handle)]
        self._filling.begin_step()
        self._pool.next_step()
        self.rank, self.size = self._transport.rank, self._transport.size
        if (self._way.exchange.rank, self._way.exchange.size) != (self.rank, self.size):
            self._way_or_none = None
        exchange = self._way.exchange
        self.number = self._names.join(self)
        self._proposal = self.steps.propose(exchange.summands, step)
        self._all_here = None if self._way.branches else True
        exchange.codec(self._proposal.bits)
        exchange.begin_step()
        self.stats.steps += 1
        self.steps_begun += 1

    @property
    def _way(self) -> Way:
        if self._way_or_none is None:
            self._way_or_none = Way.of(
                self.options, self._transport, self._protocol_type, self._pool.take, self._settle,
                self.steps.memory,
            )  # fmt: skip
        return self._way_or_none

    def _settle(self, agreement: Agreement) -> None:
        self._all_here = agreement.all_here
        self.steps.settle(agreement, self._record)
        self.stats.bits = agreement.bits

    def _launch(self, bucket: Bucket, behind: int = 0) -> None:
        """Starts the exchange of a bucket; ``behind`` as in ``flush``."""
        bucket.close()
        if not self.alone:
            self.stats.compressed_bytes_before += bucket.nbytes
            self.stats.elements += sum(item.numel for item in bucket.items)
        else:
            for item in bucket.items:
                self.stats.bypass("alone", item.x.nbytes, lambda: self.rank)
        exchange = self._way.exchange
        proposal = dataclasses.replace(self._proposal, behind=behind)
        terms = Terms(proposal.step, proposal.bits, rehearses=exchange.to_rehearse(bucket))
        running = self._way.protocol.run(bucket, proposal, terms)
        flight = Flight(bucket, running, terms, self._transport, self.stats, exchange.counted)
        self._flights[bucket] = flight
        self._sent += len(bucket.items)
        self._names.unfinished.add(self)
        self._stages.launch(flight)

    def _prefix(self) -> str:
        return self._names.prefix(self.number)

    def _arrived(self, bucket: Bucket) -> Contribution | None:
        """The contribution to a bucket that is done; None before that. Where there are slots, all
        collectives must be started, and all slots filled."""
        started = self.advance()
        if self._slots.exist:
            if not started:
                return None
            self._slots.make_up(self._prefix())
        for flight in self._stages.arrived_in(len(self._way.messages)):
            self._stages.advance(flight)
        known = self._flights.get(bucket)
        if not self._slots.done() or known is None or known.result is None:
            return None
        self._done_its_part = started
        known.contribution = known.result.contribution
        return known.contribution

    def _start_rest(self) -> None:
        """Starts the collectives that other ranks may have started."""
        if self._all_here is None:
            self.advance()  # a first message may be back; until then no rank has started more
        all_here = self._all_here is not False
        count = self._way.count(all_here)
        last = 1 if self._all_here is None else count
        # A bucket has failed on all ranks: none has taken a bucket beyond it. Where ranks agree
        # ahead, the others have seen the same and started no more.
        for flight in self._stages.flights():
            if flight.failure is not None:
                last = min(last, flight.started)
            if self._protocol_type.may_give_up:
                self._slots.open(count - max(last, flight.started))
                self._orphans += flight.give_up(last, all_here)
        self._slots.make_up(self._prefix())
