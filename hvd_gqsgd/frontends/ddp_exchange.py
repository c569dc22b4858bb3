"""The exchange of DDP's buckets among the ranks of one process group.

It needs no thread of its own: a thread of the process group calls back when a collective is done,
and starts the next one. Each kind of collective has connections of its own, as the order in
which those of different kinds are started differs between ranks. Over NCCL that is so for the
agreements alone: the work after an agreement is enqueued at once, bucket after bucket.

Small buckets of the host go together where they come faster than they can be exchanged. The bits of
their means do not depend on it. With error feedback, where they might, each goes on its own.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.bucket import kind_of
from hvd_gqsgd.codecs import check_device
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.engine.agreement import Ahead, check, find_nodes, refusal, refuse
from hvd_gqsgd.engine.bucketing import AS_FLUSHED
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.joining import Joined, Joining
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.engine.streams import Stream, on
from hvd_gqsgd.front_end import FrontEnd
from hvd_gqsgd.frontends.bypass import nbytes_of, why_bypassed
from hvd_gqsgd.frontends.ddp_gradients import NamedGradients
from hvd_gqsgd.frontends.parameter_names import names_in
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Transport
from hvd_gqsgd.transports.host_staging import StagedTransport
from hvd_gqsgd.transports.nccl import NcclTransport
from hvd_gqsgd.transports.process_groups import (
    check_group,
    give_back_channels,
    has_nccl,
    host_group,
    take_channels,
)
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

__all__ = ["BucketExchange", "GroupExchange", "average_plainly"]

JOINED_BYTES = 2**22
"""The most that go together: then the bytes take as long as the messages."""


@dataclass
class _Waiting:
    """A bucket on its way."""

    buffer: Tensor
    future: Future[Tensor]
    gradients: NamedGradients | None = None
    """Those that it is made of, with error feedback."""
    small: Future[Tensor] | None = None
    """The means of small gradients."""
    tickets: list[Ticket] = field(default_factory=list)
    error: Exception | None = None

    @property
    def stream(self) -> Stream:
        """Of its exchange, once that was started."""
        return self.tickets[0].bucket.stream if self.tickets else None

    @property
    def tensors(self) -> Sequence[tuple[str | None, Tensor]]:
        """What is exchanged, with names."""
        return [(None, self.buffer)] if self.gradients is None else self.gradients.named

    def poll(self, pipeline: Pipeline) -> bool:
        """Whether all of it can be decoded."""
        last = {ticket.bucket: ticket for ticket in self.tickets}.values()
        # Each, as polling also starts what can be.
        arrived = [pipeline.poll(ticket) is not None for ticket in last]
        return all(arrived) and (self.small is None or self.small.done())

    def decode(self, pipeline: Pipeline, share: float) -> None:
        """Writes the means to the buffer."""
        with on(self.stream):
            for ticket in self.tickets:
                pipeline.decode(ticket, share)
            if self.gradients is not None:
                small = self.small.wait() if self.small is not None else None
                self.gradients.take_over(small)

    def outcome(self) -> Tensor:
        """The averaged buffer. Raised in a callback of the future is an error that DDP
        understands; the future itself could not hold it."""
        if self.error is not None:
            raise self.error
        return self.buffer


class GroupExchange:
    """The ranks of a process group, which have the same options. All of them must make it together.

    Args:
        group: the ranks; None for the default group.
        front_end: checks ``given``.
        given: the keywords of the user.

    Raises:
        Exception: see ``DDPState``.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, front_end: FrontEnd, given: Mapping[str, Any]
    ) -> None:
        checked = check_group(group)
        self._group = weakref.ref(checked)
        self._host = TorchDistributedTransport(host_group(checked))
        self._host.nodes = find_nodes(self._host, "hosts")
        try:
            self.options = front_end.options(given)
            self._try_options(checked)
        except (TypeError, ValueError):
            refuse(self._host, "options")
            raise
        check(self._host, self.options, "options")  # that all ranks compress the same buckets
        self.rank, self.size = self._host.rank, self._host.size

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks; None once the process group was destroyed."""
        return self._group()

    def _try_options(self, group: dist.ProcessGroup) -> None:
        """Raises a ValueError if the options are not possible here, before ranks compare them."""


class BucketExchange(GroupExchange):
    """The connections of a process group, and the buckets in flight.

    Args:
        group, front_end, given: as for ``GroupExchange``.
        stats: counts messages, tensors and steps.
        steps: the state of the training; None: a new one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        front_end: FrontEnd,
        given: Mapping[str, Any],
        stats: Stats,
        steps: Steps | None,
    ) -> None:
        _let_threads_leave()
        self._given = given
        super().__init__(group, front_end, given)
        self._share = 1 / self.size
        messages = self._messages[:1] if self._device is not None else self._messages
        self._channels = take_channels(self.group, messages)
        host = self._host
        self._transport = self._on(
            TorchDistributedTransport(host.group, self._channels, self._progress, host.nodes)
        )
        self.steps = steps or Steps(self.options.width, feedback=self.options.error_feedback)
        self._stats = stats
        # One header a bucket of DDP, whatever its gradients: the one that ``_refuse`` sends.
        self._pipeline = Pipeline(
            self.options, self._transport, protocol=Ahead, steps=self.steps, stats=stats,
            plan=AS_FLUSHED,
        )  # fmt: skip
        # Held by the thread that works on the pipeline: that of the backward pass, or one of the
        # process group's. Those do not wait for it, but leave word that there is more to do.
        self._lock = threading.Lock()
        self._more = False
        # The widths of BlockBits follow from all blocks that go together, and the leader, and
        # whether estimates begin anew, from all their gradients.
        self._joins = not isinstance(self.options.bits, BlockBits) and self._names is None
        self._joining: Joining[_Waiting] = Joining(JOINED_BYTES)
        self._in_flight: deque[Joined[_Waiting]] = deque()
        self._failure: Exception | None = None  # the first one of this step
        self.described = self._pipeline.describe()
        if self._transport.nccl is not None:
            self._transport.nccl.connect()  # here, where all ranks are

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing goes on in the meantime."""
        with self._lock:
            yield
        if self._more:
            self._progress()

    def average(
        self, buffer: Tensor, begin: bool, parts: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Future[Tensor]:
        """Starts averaging a buffer, flat and in place unless it is sparse.

        Args:
            buffer: the gradients of a bucket.
            begin: whether it begins a step.
            parts: the parameters and their gradients, parts of the buffer, with error feedback.

        Raises:
            NotImplementedError: it is on a device for which there are no kernels.
            ValueError: it is on another GPU than was the current one when this was made.
        """
        least = self.options.min_numel
        largest = max((gradient.numel() for _, gradient in parts), default=buffer.numel())
        why = why_bypassed(buffer, 0) or ("small" if largest < least else None)
        if why is None:
            check_device("GlobalQSGD got a bucket", buffer)
            if self._device is not None and buffer.device != self._device:
                raise ValueError(
                    f"the hook's state was made for {self._device}, and got a bucket on "
                    f"{buffer.device}: call torch.cuda.set_device() before ddp_state()"
                )
        while begin and self._joining:  # of a step that was left in the middle
            self._transport.idle()
        with self.held():
            if begin:
                self._failure = None
                self._pipeline.begin_step()
            if why is not None:
                for each in [gradient for _, gradient in parts] or [buffer]:
                    self._stats.bypass(why, nbytes_of(each), lambda: self.rank)
                return average_plainly(buffer, self.group)
            future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
            waiting = _Waiting(buffer, future)
            averaged = future.then(lambda _: waiting.outcome())
            error = self._take_apart(waiting, parts)
            if self._failure is not None:
                error = RuntimeError("an earlier bucket of this step has failed")
            if error is not None:
                self._failure = self._failure or error
                self._refuse(waiting, error)
                future.set_result(buffer)
                return averaged
            kind = kind_of(buffer.dtype, buffer.device)
            alone = buffer.is_cuda or not self._joins
            self._joining.add(waiting, None if alone else kind, buffer.nbytes)
            # Here, after the work that this thread has enqueued on a GPU.
            finished = self._step()
            # Once the others of the bucket are counted: else it might look as if there were none.
            for small in waiting.gradients.small if waiting.gradients is not None else ():
                self._stats.bypass("small", small.nbytes, lambda: self.rank)
        self._hand_back(finished)
        return averaged

    def close(self) -> None:
        """Leaves the connections to the next one. All ranks must call this, with nothing in
        flight."""
        if self._transport.nccl is not None:
            self._transport.nccl.close()
        if self.group is not None:
            give_back_channels(self.group, self._channels)
        self._channels = {}

    def _try_options(self, group: dist.ProcessGroup) -> None:
        # Over NCCL just the agreements go over the host, and all else is enqueued in one order.
        nccl = has_nccl(group) and native_nccl.built()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        self._names = names_in(self._given)
        self._messages = Pipeline(self.options, self._on(self._host), protocol=Ahead).messages

    def _on(self, host: Transport) -> Transport:
        """The transport of the buckets, given that of the agreements."""
        if self._device is not None:
            return NcclTransport(host, self._device)
        return StagedTransport(host)

    def _progress(self) -> None:
        """Takes all buckets as far as they can go now, and hands back those that are done."""
        self._more = True
        # The thread that holds the lock checks for more after it has released the lock.
        while self._more and self._lock.acquire(blocking=False):
            try:
                self._more = False
                finished = self._step()
            finally:
                self._lock.release()
            self._hand_back(finished)

    def _hand_back(self, finished: list[_Waiting]) -> None:
        for waiting in finished:
            # With the buffer as its value, a future records the work of this stream.
            with on(waiting.stream):
                waiting.future.set_result(waiting.buffer)

    def _step(self) -> list[_Waiting]:
        finished: list[_Waiting] = []
        try:
            self._start()
            if not self._in_flight:
                self._pipeline.advance()  # buckets of a lost step, for which other ranks wait
            moved = True
            while moved and self._in_flight:
                moved = self._land(finished)
                moved |= self._start()
        except Exception as latest:
            # Others that this rank has refused a bucket may refuse those before it: the error is
            # that of this rank.
            self._failure = error = self._failure or latest
            for joined in self._in_flight:
                for waiting in joined.members:
                    waiting.error = error
                finished += joined.members
            self._in_flight.clear()
            queued = self._joining.restart()
            for waiting in queued:
                self._refuse(waiting, error)
            finished += queued
        return finished

    def _start(self) -> bool:
        """Starts the exchanges that can be; returns whether there were any."""
        started = False
        while (joined := self._joining.take(self._in_flight)) is not None:
            self._in_flight.append(joined)
            for waiting in joined.members:
                waiting.tickets = [
                    self._pipeline.submit(x, name, scale=self._share, out=x)
                    for name, x in waiting.tensors
                ]
            self._pipeline.flush(joined.behind)
            started = True
        return started

    def _land(self, finished: list[_Waiting]) -> bool:
        """Looks at the oldest exchange, and decodes it if it is done; returns whether it was."""
        oldest = self._in_flight[0].members[0]  # the others are in the same messages
        (latest, *_) = self._in_flight[-1].members[0].tickets
        arrived = oldest.poll(self._pipeline)
        if self._joining.undecided and (behind := self._pipeline.behind(latest)) is not None:
            self._joining.agree(behind)
        if arrived:
            members = self._in_flight[0].members
            for waiting in members:
                waiting.decode(self._pipeline, self._share)
            self._in_flight.popleft()
            finished += members
        return arrived

    def _take_apart(
        self, waiting: _Waiting, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> Exception | None:
        """Finds the names of gradients, and averages the small ones; returns an error of this rank.

        The small ones go even if there is an error, as on the other ranks.
        """
        if self._names is None:
            return None
        found = waiting.gradients = NamedGradients(parts, self._names, self.options.min_numel)
        if found.small:
            waiting.small = average_plainly(found.small_ones(), self.group)
            waiting.small.add_done_callback(lambda _: self._progress())
        return found.error

    def _refuse(self, waiting: _Waiting, error: Exception) -> None:
        """Gives up a bucket after an error. The other ranks may not know of that yet, and must find
        as many operations as they start."""
        self._transport.max_async(refusal(), "header")
        waiting.error = error


def average_plainly(buffer: Tensor, group: dist.ProcessGroup | None) -> Future[Tensor]:
    """Starts averaging a buffer uncompressed, in place."""
    size = dist.get_world_size(group)
    work = dist.all_reduce(buffer.div_(size), group=group, async_op=True)
    assert work is not None
    future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


@functools.cache
def _let_threads_leave() -> None:
    """Before the interpreter ends: it kills threads that come for it then, and one of Gloo's, on
    its way back from a callback, would take the process along."""
    atexit.register(time.sleep, 0.1)
