"""Buckets in flight: norms out, codes out, gradient back. Knows no transport from another.

A tensor is handed in by ``submit`` and joins a bucket. A full bucket starts the Max of its block
norms and is left alone; a later ``submit`` finds the norms reduced, rounds the tensors to codes on
them and starts the Sum. ``wait`` returns when the Sum is there, and ``decode`` makes the gradient.
Nothing before ``wait`` blocks, and nothing before ``wait`` raises for what another rank did: every
rank must come to the point where all of them learn of it.

**Steps.** A step begins with the first ``submit`` after all earlier tickets were decoded or
dropped. Numbers that ranks must share (names of messages, dither) count from the start of the step,
so that a rank which lost a step, or joined later, falls in line with the next one. The step number
itself is the largest of all ranks', carried by the norms.

**Turns.** When norms come back differs from rank to rank, but transports want every rank to start
its operations in one order, and Horovod names what its users leave unnamed by counting the
operations started so far. So sums are started in the order of the buckets, and at fixed points
only: each full bucket brings two turns, right after its norms were sent off, to start the sum of an
earlier one or to pass. Turns that were not passed are made up for in ``wait``, where the remaining
sums are started too. So wherever the user's code runs, all ranks have started the same number of
operations.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections import Counter
from collections.abc import Hashable

from torch import Tensor

from hvd_gqsgd.buckets import Bucket, BucketPlan, Contribution, Item, Kind, State, kind_of
from hvd_gqsgd.buffers import BufferPool
from hvd_gqsgd.codecs.linear import LinearCodec
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports import Handle, Transport

__all__ = ["Namespace", "Pipeline", "Ticket"]

# With one turn a bucket, a bucket whose norms were late once would hold up all later ones.
TURNS = 2

ORDER = (
    "without named_parameters tensors are told apart by their order of arrival, so pass "
    "GlobalQSGD(named_parameters=model.named_parameters()) if that may differ between ranks"
)


class Ticket:
    """A tensor on its way. Dropping it is how to say that its result is not wanted any more."""

    __slots__ = ("__weakref__", "bucket", "item")

    def __init__(self, bucket: Bucket, item: Item) -> None:
        self.bucket = bucket
        self.item = item


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

    def join(self, pipeline: Pipeline) -> int:
        """The smallest number that no other pipeline with tickets out has."""
        self._pipelines.add(pipeline)
        for other in list(self.unfinished):
            if other is not pipeline and not other.active:
                other.abandon()  # its names must not come up again
        taken = {p.number for p in self._pipelines if p is not pipeline and p.active}
        return next(number for number in itertools.count() if number not in taken)


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
    ) -> None:
        self.options = options
        self.stats = stats or Stats()
        self._transport = transport
        self._namespace = namespace or Namespace()
        self._plan = plan
        self._pool = BufferPool()
        self._session: object = None
        self._next_step = step
        self._options_digest = options.digest()
        self._live: weakref.WeakSet[Ticket] = weakref.WeakSet()
        self._open: dict[Hashable, Bucket] = {}
        self._in_flight: list[Bucket] = []
        self._orphans: list[Handle] = []
        self._sent = 0  # tensors whose norms were sent off and that are not decoded
        self._step = step
        self.number = 0  # of the step, from the namespace
        self._codec: LinearCodec | None = None
        self._arrivals = itertools.count()
        self._positions = itertools.count()
        self._repeats: Counter[Hashable] = Counter()
        self._opened: Counter[Hashable] = Counter()
        self._turns = 0
        self._passes: list[Handle] = []
        self._reaped_passes = 0

    @property
    def active(self) -> bool:
        """Whether a ticket is neither decoded nor dropped."""
        return bool(self._live)

    def submit(self, x: Tensor, name: str | None = None) -> Ticket:
        """Hands in a flat, contiguous tensor, which must stay as it is until it is decoded.

        Raises:
            ValueError: the lanes are too narrow for the number of ranks.
        """
        if not self.active or self._transport.session is not self._session:
            self._begin_step()

        label = name if name is not None else next(self._arrivals)
        repeat = self._repeats[label]
        self._repeats[label] += 1
        kind = kind_of(x.dtype, x.device)
        planned = self._plan.places.get(name) if self._plan and name is not None else None
        if planned is not None:
            number, position = planned
            key: Hashable = number
        else:
            key, position = kind, next(self._positions)

        bucket = self._open.get(key) or self._open_bucket(key, kind)
        identity = digest((label, repeat, x.numel(), str(x.dtype)))
        item = Item(x, x.numel(), x.dtype, x.device, position, identity)
        bucket.add(item)
        ticket = Ticket(bucket, item)
        self._live.add(ticket)

        if planned is not None and self._plan is not None:
            full = len(bucket.items) == self._plan.sizes[number]
        else:
            full = bucket.nbytes >= self.options.bucket_bytes
        if full:
            self._launch(key)
            for _ in range(TURNS):
                self._take_turn()
        return ticket

    def flush(self) -> None:
        """Starts the buckets that are not full."""
        for key in list(self._open):
            self._launch(key)

    def advance(self) -> bool:
        """Starts the sums whose turn it is; whether all buckets sent off are past that."""
        while (bucket := self._next_to_sum()) is not None and self._advance(bucket):
            pass
        return bucket is None

    def wait(self, ticket: Ticket, patience: float | None = None) -> Contribution | None:
        """Waits for the sum of a tensor's codes and tells which ranks are in it.

        With ``patience``, returns None if it has not come after so many seconds.

        Raises:
            AgreementError: ranks disagree on the options or on the tensors of a bucket.
            RuntimeError: the ticket was decoded or given up before.
            Exception: whatever the transport raised.
        """
        deadline = None if patience is None else time.monotonic() + patience
        self.flush()
        while not self._arrived(ticket.bucket):
            failure = next((b.failure for b in self._in_flight if b.failure is not None), None)
            if isinstance(failure, AgreementError):
                self.abandon()
            if failure is not None:
                self.forget()
                raise failure
            if ticket not in self._live:
                raise RuntimeError(
                    f"{ticket.bucket.name} is not in flight here: it was decoded before, given up "
                    "after an error, or is another compressor's"
                )
            if deadline is not None and time.monotonic() > deadline:
                return None
            self._transport.idle()
        assert ticket.bucket.contribution is not None
        return ticket.bucket.contribution

    def decode(self, ticket: Ticket, scale: float) -> Tensor:
        """``scale`` times the sum over the ranks, flat. Once a ticket, and after ``wait``."""
        bucket, item = ticket.bucket, ticket.item
        if ticket not in self._live:
            raise RuntimeError(f"a tensor of {bucket.name} was decoded or given up before")
        assert bucket.norms is not None and bucket.words is not None
        assert bucket.codec is not None and bucket.contribution is not None
        out = self._pool.take(item.numel, item.dtype, item.device)
        bucket.codec.decode(
            bucket.words[item.words], bucket.norms[item.norms], out,
            bucket.contribution.count, scale,
        )  # fmt: skip
        item.x = None
        bucket.undecoded -= 1
        if not bucket.undecoded:
            bucket.norms = bucket.words = None
        self._live.discard(ticket)
        self._sent -= 1
        if not self._sent:
            self._namespace.unfinished.discard(self)
        return out

    def abandon(self) -> None:
        """Ends the step for all its tickets, after an error that all ranks come to see.

        Explicit, so that it does not hang on when each rank frees the tickets: an exception's
        traceback may keep them for long. Sums that other ranks may have started are started here
        too, whatever is in their words, or they would be in flight for ever.
        """
        failed = False
        for bucket in self._in_flight:
            failed = failed or bucket.failure is not None
            if bucket.state is not State.NORMS or bucket.words is None:
                continue
            if failed:  # on all ranks, so that none of them has started this sum
                self._turns += 1
                continue
            if bucket.handle is not None:
                self._orphans.append(bucket.handle)
            bucket.handle = self._transport.sum_async(bucket.words, f"{bucket.name}.codes")
        self._pass_turns()
        self._namespace.failures += 1
        self.forget()

    def forget(self) -> None:
        """Ends the step for all its tickets and sends nothing."""
        for bucket in (*self._open.values(), *self._in_flight):
            if bucket.handle is not None:
                self._orphans.append(bucket.handle)
            bucket.abandon()
        self._orphans += self._passes[self._reaped_passes :]
        self._passes.clear()
        self._reaped_passes = 0
        self._open.clear()
        self._in_flight.clear()
        self._live.clear()
        self._sent = 0
        self._namespace.unfinished.discard(self)

    def _begin_step(self) -> None:
        """Leaves behind whatever was not decoded, and counts from the start again."""
        session = self._transport.session
        self._namespace.renew(session)
        if session is not self._session:
            self._session = session
            self.forget()
            self._orphans.clear()  # handles of another session mean nothing in this one
        if self._sent:
            self.abandon()
        self.forget()
        self._turns = 0
        self._orphans = [handle for handle in self._orphans if not _reaped(handle)]
        self._arrivals, self._positions = itertools.count(), itertools.count()
        self._repeats.clear()
        self._opened.clear()
        self._pool.next_step()
        rank, size = self._transport.rank, self._transport.size
        if self._codec is None or (self._codec.rank, self._codec.world_size) != (rank, size):
            self._codec = LinearCodec.from_options(self.options, rank, size)
        self.number = self._namespace.join(self)
        self._step = self._next_step
        self._next_step += 1
        self.stats.steps += 1

    def _open_bucket(self, key: Hashable, kind: Kind) -> Bucket:
        planned = isinstance(key, int)
        label = f"planned{key}" if planned else f"{kind[1].type}-{str(kind[0])[6:]}"
        bucket = Bucket(f"{self._prefix()}.{label}.{self._opened[key]}", kind)
        self._opened[key] += 1
        self._open[key] = bucket
        return bucket

    def _launch(self, key: Hashable) -> None:
        """Takes this rank's norms of a bucket and starts their maximum."""
        assert self._codec is not None
        bucket = self._open.pop(key)
        num_norms, num_words = bucket.lay_out(self._codec)
        norm_dtype, device = bucket.kind
        bucket.norms = self._pool.take(num_norms, norm_dtype, device)
        bucket.words = self._pool.take(num_words, self._codec.word_dtype, device)
        bucket.write_norm_header(self._options_digest, self._step)
        for item in bucket.items:
            assert item.x is not None
            self._codec.norms(item.x, bucket.norms[item.norms])
        self.stats.compressed_bytes_before += bucket.nbytes
        self.stats.compressed_bytes_on_wire += bucket.norms.nbytes + bucket.words.nbytes
        self._in_flight.append(bucket)
        self._sent += len(bucket.items)
        self._namespace.unfinished.add(self)
        bucket.state = State.NORMS
        bucket.handle = self._transport.max_async(bucket.norms, f"{bucket.name}.norms")

    def _prefix(self) -> str:
        return f"{self._namespace.label}.{self.number}.{self._namespace.failures}"

    def _take_turn(self) -> None:
        """Starts one sum if its norms are there, and passes otherwise."""
        self._turns += 1
        bucket = self._next_to_sum()
        if bucket is None or not self._advance(bucket):
            self._pass_turn()

    def _pass_turn(self) -> None:
        name = f"{self._prefix()}.pass.{len(self._passes)}"
        self._passes.append(self._transport.pass_turn(name))
        self.stats.compressed_bytes_on_wire += self._transport.turn_bytes

    def _pass_turns(self) -> None:
        """Makes up for the turns that were not passed."""
        while len(self._passes) < self._turns:
            self._pass_turn()

    def _next_to_sum(self) -> Bucket | None:
        """The oldest bucket whose codes are not out: sums start in the order of the buckets."""
        return next((b for b in self._in_flight if b.state is State.NORMS), None)

    def _arrived(self, bucket: Bucket) -> bool:
        """Whether a bucket is done, with all sums started and all turns passed."""
        if not self.advance():
            return False
        self._pass_turns()
        for other in list(self._in_flight):
            self._advance(other)
        while self._reaped_passes < len(self._passes) and self._passes[self._reaped_passes].done():
            self._passes[self._reaped_passes].wait()
            self._reaped_passes += 1
        return bucket.state is State.DONE and self._reaped_passes == len(self._passes)

    def _advance(self, bucket: Bucket) -> bool:
        """Takes a bucket one state further if its operation is done; whether it was."""
        if bucket.failure is not None or bucket.handle is None or not bucket.handle.done():
            return False
        handle, bucket.handle = bucket.handle, None
        try:
            handle.wait()
            if bucket.state is State.NORMS:
                self._send_codes(bucket)
            else:
                bucket.contribution = bucket.read_code_header()
                bucket.state = State.DONE
                self._in_flight.remove(bucket)
            return True
        except Exception as error:
            # Kept for wait(): raised here, in the middle of one rank's backward pass, it would
            # leave the others waiting for tensors that never come.
            bucket.failure = error
            return False

    def _send_codes(self, bucket: Bucket) -> None:
        """Rounds a bucket's tensors on the global norms and starts the sum."""
        assert bucket.norms is not None and bucket.words is not None and bucket.codec is not None
        options_agree, tensors_agree, step = bucket.read_norm_header()
        if not options_agree:
            raise AgreementError(
                f"{bucket.name}: the ranks use different options; this rank has {self.options}"
            )
        if not tensors_agree:
            raise AgreementError(
                f"{bucket.name}: the ranks handed in different tensors, or in another order; "
                f"{ORDER}"
            )
        self._next_step = max(self._next_step, step + 1)
        bucket.write_code_header(bucket.codec.rank)
        for item in bucket.items:
            assert item.x is not None
            bucket.codec.encode(
                item.x, bucket.norms[item.norms], bucket.words[item.words], step, item.identity
            )
        bucket.state = State.CODES
        bucket.handle = self._transport.sum_async(bucket.words, f"{bucket.name}.codes")


def _reaped(handle: Handle) -> bool:
    """Clears away an operation that nobody waits for any more, if it is done."""
    if not handle.done():
        return False
    with contextlib.suppress(Exception):
        handle.wait()
    return True
