"""The exchange of DDP's buckets among the ranks of one process group.

It goes on by itself: the process group's threads call back when a collective is done, and whoever
is called starts the next one. Each kind of collective has connections of its own, as the order in
which those of different kinds are started differs between ranks. Over NCCL that is so for the
agreements alone: what follows one is enqueued at once, bucket after bucket.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.codecs import check_device
from hvd_gqsgd.engine.agreement import Ahead, check, refusal, refuse
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.engine.streams import on
from hvd_gqsgd.frontends.bypass import nbytes_of, why_bypassed
from hvd_gqsgd.options import FrontEnd
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

__all__ = ["BucketExchange"]


@dataclass
class _Waiting:
    """A bucket on its way."""

    buffer: Tensor
    future: Future[Tensor]
    ticket: Ticket | None = None
    error: Exception | None = None

    def outcome(self) -> Tensor:
        """The averaged buffer. Raised in a callback of the future is an error that DDP
        understands; the future itself could not hold it."""
        if self.error is not None:
            raise self.error
        return self.buffer


class BucketExchange:
    """The connections of a process group, and the buckets in flight. All of its ranks must make it
    together.

    Args:
        group: the ranks; None for the default group.
        front_end: checks ``given``.
        given: the keywords of the user.
        stats: counts messages, tensors and steps.
        steps: the state of the training; None: a new one.

    Raises:
        Exception: see ``DDPState``.
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
        checked = check_group(group)
        self._group = weakref.ref(checked)
        host = TorchDistributedTransport(host_group(checked))
        # Over NCCL just the agreements go over the host, and all else is enqueued in one order.
        nccl = has_nccl(checked) and native_nccl.built()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        try:
            self.options = front_end.options(given)
            messages = Pipeline(self.options, self._on(host), protocol=Ahead).messages
        except (TypeError, ValueError):
            refuse(host, "options")
            raise
        check(host, self.options, "options")  # that all ranks compress the same buckets
        self.rank, self.size = host.rank, host.size
        self._share = 1 / host.size
        self._channels = take_channels(checked, messages[:1] if nccl else messages)
        self._transport = self._on(
            TorchDistributedTransport(host.group, self._channels, self._progress)
        )
        self.steps = steps or Steps(self.options.bits)
        self._stats = stats
        self._pipeline = Pipeline(
            self.options, self._transport, protocol=Ahead, steps=self.steps, stats=stats
        )
        # Held by whoever works on the pipeline: the thread of the backward pass, or one of the
        # process group's. Those do not wait for it, but leave word that there is more to do.
        self._lock = threading.Lock()
        self._more = False
        self._waiting: list[_Waiting] = []
        self._failed = False  # in this step
        if self._transport.nccl is not None:
            self._transport.nccl.connect()  # here, where all ranks are

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks; None once the process group was destroyed."""
        return self._group()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing goes on in the meantime."""
        with self._lock:
            yield
        if self._more:
            self._progress()

    def average(self, buffer: Tensor, begin: bool) -> Future[Tensor]:
        """Starts averaging a buffer, flat and in place unless it is sparse; ``begin`` begins a
        step.

        Raises:
            NotImplementedError: it is on a device for which there are no kernels.
            ValueError: it is on another GPU than was the current one when this was made.
        """
        why = why_bypassed(buffer, self.options.min_numel)
        if why is None:
            check_device("GlobalQSGD got a bucket", buffer)
            if self._device is not None and buffer.device != self._device:
                raise ValueError(
                    f"the hook's state was made for {self._device}, and got a bucket on "
                    f"{buffer.device}: call torch.cuda.set_device() before ddp_state()"
                )
        with self.held():
            if begin:
                self._failed = False
                self._pipeline.begin_step()
            if why is not None:
                self._stats.bypass(why, nbytes_of(buffer), lambda: self.rank)
                return self._average_plainly(buffer)
            future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
            waiting = _Waiting(buffer, future)
            averaged = future.then(lambda _: waiting.outcome())
            if self._failed:
                # The others may not know yet, and must find as many operations as they start.
                self._transport.max_async(refusal(), "header")
                waiting.error = RuntimeError("an earlier bucket of this step has failed")
                future.set_result(buffer)
                return averaged
            waiting.ticket = self._pipeline.submit(buffer, scale=self._share, out=buffer)
            self._waiting.append(waiting)
            self._pipeline.flush()
        self._progress()
        return averaged

    def close(self) -> None:
        """Leaves the connections to the next one. All ranks must call this, with nothing in
        flight."""
        if self._transport.nccl is not None:
            self._transport.nccl.close()
        if self.group is not None:
            give_back_channels(self.group, self._channels)
        self._channels = {}

    def _on(self, host: Transport) -> Transport:
        """The transport of the buckets, given that of the agreements."""
        if self._device is not None:
            return NcclTransport(host, self._device)
        return StagedTransport(host)

    def _average_plainly(self, buffer: Tensor) -> Future[Tensor]:
        work = dist.all_reduce(buffer.div_(self.size), group=self.group, async_op=True)
        assert work is not None
        future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future

    def _progress(self) -> None:
        """Takes all buckets as far as they can go now, and hands back those that are done."""
        self._more = True
        # Whoever holds the lock looks for more once it has let go of it.
        while self._more and self._lock.acquire(blocking=False):
            try:
                self._more = False
                finished = self._step()
            finally:
                self._lock.release()
            for waiting in finished:
                # With the buffer as its value, a future notes what this stream has to do before.
                assert waiting.ticket is not None
                with on(waiting.ticket.bucket.stream):
                    waiting.future.set_result(waiting.buffer)

    def _step(self) -> list[_Waiting]:
        finished: list[_Waiting] = []
        try:
            while self._waiting:
                ticket = self._waiting[0].ticket
                assert ticket is not None
                if self._pipeline.poll(ticket) is None:
                    break
                with on(ticket.bucket.stream):
                    self._pipeline.decode(ticket, self._share)
                finished.append(self._waiting.pop(0))
        except Exception as error:
            self._failed = True
            for waiting in self._waiting:
                waiting.error = error
            finished += self._waiting
            self._waiting.clear()
        return finished


@functools.cache
def _let_threads_leave() -> None:
    """Before the interpreter ends: it kills threads that come for it then, and one of Gloo's, on
    its way back from a callback, would take the process along."""
    atexit.register(time.sleep, 0.1)
