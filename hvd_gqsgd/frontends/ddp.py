"""GlobalQSGD for PyTorch's DistributedDataParallel: a communication hook.

DDP hands the hook its buckets of gradients, in one order on all ranks, and takes back futures. The
exchange of a bucket goes on by itself: the process group's threads call back when a collective is
done, and whoever is called starts the next one. Each kind of collective has a process group of its
own, as the order in which those of different kinds are started differs between ranks. Over NCCL
that is so for the agreements alone: what follows one is enqueued at once, bucket after bucket.
"""

# No `from __future__ import annotations`: DDP compares those of its hook with types.
import atexit
import dataclasses
import functools
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd.codecs import check_device, is_compressible
from hvd_gqsgd.engine.agreement import Ahead, check, refusal, refuse
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.engine.streams import on
from hvd_gqsgd.options import FrontEnd, OptionKeywords
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

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DDPState", "GQSGDState", "ddp_hook"]

FRONT_END = FrontEnd(
    "DDPState()",
    own=("process_group",),
    without={
        "bucket_mb": "DDP makes the buckets; give bucket_cap_mb to DistributedDataParallel",
        "named_parameters": "DDP knows its parameters, and hands in buckets; leave it out",
        "process_set": "that is Horovod's; give a process_group",
    },
)
OF_COMPRESSOR = dataclasses.replace(FRONT_END, name="GlobalQSGD.ddp_state()")


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
    """The state of ``ddp_hook`` for one model: what it keeps from bucket to bucket.

    ::

        model = DistributedDataParallel(model)
        model.register_comm_hook(DDPState(bits=8), ddp_hook)

    DDP's buckets take the place of tensors: ``min_numel`` is compared with a whole bucket, and
    DDP's ``bucket_cap_mb`` takes the place of ``bucket_mb``. ``GQSGDState`` is the same class.

    All ranks of the process group must make their states together, as a state opens process groups
    of its own: one for each kind of message.

    Args:
        process_group: the one that the model uses; None for the default group.
        options: see :class:`hvd_gqsgd.options.Options`. All but ``bucket_mb``.

    Raises:
        TypeError: an option is unknown, has no effect here, or has the wrong type, or
            ``process_group`` is no process group.
        ValueError: an option is out of range, the lanes are too narrow for the world size, this
            process is not in the process group, or there is no default group.
        AgreementError: on all ranks, if their options differ; on all other ranks, if one raises an
            error about its options.
        RuntimeError: NCCL could not be started.
    """

    @FRONT_END.documented
    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        **options: "Unpack[OptionKeywords]",
    ) -> None:
        self._connect(process_group, FRONT_END, options, Stats())

    @classmethod
    def of_compressor(
        cls,
        process_group: dist.ProcessGroup | None,
        given: Mapping[str, Any],
        stats: Stats,
        steps: Steps,
    ) -> "DDPState":
        """The state of ``GlobalQSGD.ddp_state``: of a compressor's keywords, counts and steps."""
        state = cls.__new__(cls)
        state._connect(process_group, OF_COMPRESSOR, given, stats, steps)
        return state

    def _connect(
        self,
        group: dist.ProcessGroup | None,
        front_end: FrontEnd,
        given: Mapping[str, Any],
        stats: Stats,
        steps: Steps | None = None,
    ) -> None:
        _let_threads_leave()
        self._group = group
        host = TorchDistributedTransport(host_group(group))
        # Over NCCL just the agreements go over the host, and all else is enqueued in one order.
        nccl = has_nccl(group) and native_nccl.built()
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        try:
            options = self.options = front_end.options(given)
            messages = Pipeline(options, self._on(host), protocol=Ahead).messages
        except (TypeError, ValueError):
            refuse(host, "options")
            raise
        check(host, options, "options")  # that buckets are compressed on all ranks or on none
        self._channels = take_channels(host.group, messages[:1] if nccl else messages)
        self._transport = self._on(
            TorchDistributedTransport(host.group, self._channels, self._progress)
        )
        self._host = host
        self._stats = stats
        self._steps = steps or Steps(options.bits)
        self._pipeline = Pipeline(
            options, self._transport, protocol=Ahead, steps=self._steps, stats=self._stats
        )
        self._min_numel = options.min_numel
        self.world_size = host.size
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
            RuntimeError: the state was closed.
            ValueError: it is on another GPU than was the current one when this was made.
        """
        if not self._channels:
            raise RuntimeError("the state of ddp_hook was closed: make another one")
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

    def stats(self) -> Stats:
        """Returns a copy of this rank's counts of bytes and tensors."""
        with self._lock:
            return dataclasses.replace(self._stats)

    def reset_stats(self) -> None:
        """Sets all counts to zero."""
        with self._lock:
            self._stats.reset()

    def close(self) -> None:
        """Leaves the connections to the next state, for programs that make many models.

        All ranks must call it, with no backward pass under way. The state cannot be used any more.
        """
        if self._transport.nccl is not None:
            self._transport.nccl.close()
        give_back_channels(self._host.group, self._channels)
        self._channels = {}

    def state_dict(self) -> dict[str, Any]:
        """See ``GlobalQSGD.state_dict``."""
        with self._lock:
            return self._steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``GlobalQSGD.load_state_dict``."""
        with self._lock:
            self._steps.load_state_dict(state)

    def __repr__(self) -> str:
        described = self.options.describe(self.world_size)
        return f"{type(self).__name__}({self.options.keywords(FRONT_END.without)}): {described}"

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


GQSGDState = DDPState  # as PyTorch names its PowerSGDState


@functools.cache
def _let_threads_leave() -> None:
    """Before the interpreter ends: it kills threads that come for it then, and one of Gloo's, on
    its way back from a callback, would take the process along."""
    atexit.register(time.sleep, 0.1)


def ddp_hook(
    state: DDPState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """Averages a bucket of gradients over the ranks, exchanged as small integers.

    A communication hook for ``DistributedDataParallel.register_comm_hook``::

        model.register_comm_hook(DDPState(bits=8), ddp_hook)

    It returns at once: the exchange overlaps with the backward pass.

    Args:
        state: a :class:`DDPState`, or the result of ``GlobalQSGD.ddp_state``.
        bucket: from DDP.

    Returns:
        A future of the bucket's buffer, which then holds the mean. ``backward()`` raises an error
        of the exchange on all ranks, as a ``RuntimeError`` that quotes it.
    """
    if not isinstance(state, DDPState):
        remedy = "; give its ddp_state()" if hasattr(state, "ddp_state") else ""
        raise TypeError(
            "the state of ddp_hook must be a GQSGDState (DDPState), as GQSGDState(bits=8), got "
            f"{state!r}{remedy}"
        )
    return state.average(bucket.buffer(), first=bucket.index() == 0)
