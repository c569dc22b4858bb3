"""GlobalQSGD for PyTorch's DistributedDataParallel: a communication hook.

DDP hands the hook its buckets of gradients, in one order on all ranks, and takes back futures. The
exchange of a bucket goes on by itself: the process group's threads call back when a collective is
done, and whoever is called starts the next one. Each kind of collective has a process group of its
own, as the order in which those of different kinds are started differs between ranks. Over NCCL
that is so for the agreements alone: what follows one is enqueued at once, bucket after bucket.
"""

# No `from __future__ import annotations`: DDP compares those of its hook with types.
import atexit
import functools
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.codecs import check_device, is_compressible
from hvd_gqsgd.engine.agreement import check, refuse
from hvd_gqsgd.engine.buckets import refusal
from hvd_gqsgd.engine.buffer_pool import BufferPool
from hvd_gqsgd.engine.pipeline import Pipeline, Ticket
from hvd_gqsgd.engine.streams import on
from hvd_gqsgd.exchanges import make_exchange
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Transport
from hvd_gqsgd.transports.host_staging import StagedTransport
from hvd_gqsgd.transports.nccl import NcclTransport
from hvd_gqsgd.transports.process_groups import (
    give_back_channels,
    has_nccl,
    host_group,
    take_channels,
)
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

__all__ = ["DDPState", "ddp_hook"]


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


class DDPState:
    """What a model's hook remembers from bucket to bucket; see ``GlobalQSGD.ddp_state``.

    Raises:
        ValueError: the lanes are too narrow for the number of ranks, or this process is not in the
            process group.
        AgreementError: on all ranks, if they use different options.
        RuntimeError: NCCL could not be started.
    """

    def __init__(
        self, options: Options, group: dist.ProcessGroup | None, stats: Stats | None = None
    ) -> None:
        _let_threads_leave()
        self._group = group
        host = TorchDistributedTransport(host_group(group))
        # Over NCCL just the agreements go over the host, and all else is enqueued in one order.
        nccl = has_nccl(group) and native_nccl.built()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        try:
            exchange = make_exchange(options, self._on(host), BufferPool(), Stats(), ahead=True)
        except ValueError:
            refuse(host, "options")
            raise
        check(host, options, "options")  # that buckets are compressed on all ranks or on none
        messages = [stage.message for stage in exchange.stages]
        self._channels = take_channels(host.group, messages[:1] if nccl else messages)
        self._transport = self._on(
            TorchDistributedTransport(host.group, self._channels, self._progress)
        )
        self._host = host
        self._stats = stats or Stats()
        self._pipeline = Pipeline(options, self._transport, stats=self._stats, ahead=True)
        self._min_numel = options.min_numel
        self._share = 1 / host.size
        # Held by whoever works on the pipeline: the thread of the backward pass, or one of the
        # process group's. Reentrant, as a collective may be done by the time it was started.
        self._lock = threading.RLock()
        self._working = False
        self._more = False
        self._waiting: list[_Waiting] = []
        self._failed = False  # in this step
        if self._transport.nccl is not None:
            self._transport.nccl.connect()  # here, where all ranks are

    def _on(self, host: Transport) -> Transport:
        """The transport of the buckets, given that of the agreements."""
        if self._device is not None:
            return NcclTransport(host, self._device)
        return StagedTransport(host)

    def average(self, buffer: Tensor, first: bool) -> Future[Tensor]:
        """Starts averaging a flat buffer in place; ``first`` begins a step.

        Raises:
            NotImplementedError: it is on a device for which there are no kernels.
            ValueError: it is on another GPU than was the current one when this was made.
        """
        self._stats.tensors += 1
        check_device("GlobalQSGD got a bucket", buffer)
        if self._device is not None and buffer.device != self._device:
            raise ValueError(
                f"the hook's state was made for {self._device}, and got a bucket on "
                f"{buffer.device}: call torch.cuda.set_device() before ddp_state()"
            )
        with self._lock:
            if first:
                self._failed = False
                self._pipeline.begin_step()
            if buffer.numel() < self._min_numel or not is_compressible(buffer.dtype):
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
        """Leaves its connections to the next state, for programs that make many models. All ranks
        must call it, with no backward pass under way; then this state cannot be used any more."""
        if self._transport.nccl is not None:
            self._transport.nccl.close()
        give_back_channels(self._host.group, self._channels)
        self._channels = {}

    def state_dict(self) -> dict[str, Any]:
        """See ``GlobalQSGD.state_dict``."""
        with self._lock:
            return self._pipeline.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``GlobalQSGD.load_state_dict``."""
        with self._lock:
            self._pipeline.load_state_dict(state)

    def _average_plainly(self, buffer: Tensor) -> Future[Tensor]:
        self._stats.tensors_bypassed += 1
        self._stats.bypassed_bytes += buffer.nbytes
        work = dist.all_reduce(buffer.div_(self._host.size), group=self._group, async_op=True)
        assert work is not None
        future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future

    def _progress(self) -> None:
        """Takes all buckets as far as they can go now, and hands back those that are done."""
        with self._lock:
            self._more = True
            if self._working:
                return  # this very thread is, and will see that there is more
            self._working = True
            finished: list[_Waiting] = []
            try:
                while self._more:
                    self._more = False
                    finished += self._step()
            finally:
                self._working = False
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


def ddp_hook(
    state: DDPState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """Averages a bucket of gradients over the ranks, as quantized integers.

    A communication hook for ``DistributedDataParallel.register_comm_hook``::

        model.register_comm_hook(GlobalQSGD(bits=8).ddp_state(), ddp_hook)

    Returns at once.

    Returns:
        A future of the bucket's buffer, which then holds the mean. Its errors are raised by
        ``backward()``, on every rank, as a ``RuntimeError`` that quotes them.
    """
    return state.average(bucket.buffer(), first=bucket.index() == 0)
