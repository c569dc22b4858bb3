"""GlobalQSGD for PyTorch's DistributedDataParallel: a communication hook and its state.

DDP hands the hook its buckets of gradients, in one order on all ranks, and takes back futures.
"""

# No `from __future__ import annotations`: DDP compares those of its hook with types.
import contextlib
import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.front_end import FrontEnd
from hvd_gqsgd.frontends.auto_ddp import AutoBucketExchange
from hvd_gqsgd.frontends.ddp_exchange import BucketExchange
from hvd_gqsgd.frontends.ddp_gradients import gradients_of
from hvd_gqsgd.frontends.parameter_names import names_in
from hvd_gqsgd.option_types import OptionKeywords
from hvd_gqsgd.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DDPState", "GQSGDState", "ddp_hook"]

_log = logging.getLogger("hvd_gqsgd")

FRONT_END = FrontEnd(
    "DDPState()",
    own=("process_group", "named_parameters"),
    without={
        "bucket_mb": "DDP makes the buckets; give bucket_cap_mb to DistributedDataParallel",
        "named_parameters": "that is for error_feedback and select='leader' here; leave it out",
        "process_set": "that is Horovod's; give a process_group",
        "patience": "DDP waits for the timeout of its process group; give that to the group",
    },
    trains=True,
    knows_parameters=True,
)
NO_BACKWARD = -1
"""PyTorch's number of a backward pass outside of any, as under DDP's ``join``."""
OF_COMPRESSOR = dataclasses.replace(FRONT_END, name="GlobalQSGD.ddp_state()")


class DDPState:
    """The state of ``ddp_hook`` for one model.

    ::

        model = DistributedDataParallel(model)
        model.register_comm_hook(DDPState(bits=8), ddp_hook)

    DDP's buckets replace tensors: ``min_numel`` is compared with the size of a whole bucket, and
    DDP's ``bucket_cap_mb`` replaces ``bucket_mb``. ``GQSGDState`` is the same class.

    With error feedback the tensors are gradients, as under Horovod: ``min_numel`` is compared with
    each, and the smaller ones of a bucket are averaged together, uncompressed.

    All ranks of the process group must create their states together: a state opens its own
    connections, one for each kind of message. Connections have the timeout of the process group.
    Without a default group, as when Lightning creates its strategy, the first bucket opens the
    connections, on the default group of that time.

    A copy, as by ``copy.deepcopy`` or ``pickle``, has its own options, counts and steps. Its first
    bucket opens its connections, on the default group.

    Args:
        process_group: the process group of the model; None for the default group.
        named_parameters: ``model.named_parameters()``, for error feedback alone, which needs it.
        options: see :class:`hvd_gqsgd.options.Options`. ``bucket_mb`` is not accepted.

    Raises:
        TypeError: an option is unknown, has no effect here, or has the wrong type, or
            ``process_group`` is no process group.
        ValueError: an option is out of range, the lanes are too narrow for the world size, this
            process is not in the process group, or ``named_parameters`` is empty, or is missing
            with error feedback.
        AgreementError: on all ranks, if options differ; on all other ranks, if one rank raises an
            error about its options.
        RuntimeError: NCCL could not be initialized.
        Exception: as raised by ``torch.distributed`` if a connection cannot be opened.
    """

    @FRONT_END.documented
    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        **options: "Unpack[OptionKeywords]",
    ) -> None:
        given: dict[str, Any] = {**options}
        if named_parameters is not None:
            # An iterator, whose pairs a copy needs too. What is none is refused with all ranks.
            again = isinstance(named_parameters, Iterable)
            given["named_parameters"] = [*named_parameters] if again else named_parameters
        self._set_up(process_group, FRONT_END, given, Stats(), None)

    @classmethod
    def of_compressor(
        cls,
        process_group: dist.ProcessGroup | None,
        given: Mapping[str, Any],
        stats: Stats,
        steps: Steps | Conductor,
    ) -> "DDPState":
        """Returns the state of ``GlobalQSGD.ddp_state``.

        Args:
            process_group: the process group of the model; None for the default group.
            given: the keywords that the compressor was created with.
            stats: the counts of the compressor, which the state increases.
            steps: the number of the next step, shared with the compressor.

        Raises:
            Exception: as raised by ``DDPState``.
        """
        state = cls.__new__(cls)
        state._set_up(process_group, OF_COMPRESSOR, given, stats, steps)
        return state

    def _set_up(
        self,
        group: dist.ProcessGroup | None,
        front_end: FrontEnd,
        given: Mapping[str, Any],
        stats: Stats,
        steps: Steps | Conductor | None,
        connect: bool = True,
    ) -> None:
        self._group = group
        self._front_end = front_end
        self._given = dict(given)
        self._stats = stats
        self._exchange: BucketExchange | AutoBucketExchange | None = None
        self._closed = False
        self._backward = NO_BACKWARD  # the latest one that began a step
        self._parameters: set[int] = set()  # of a step, where gradients come one by one
        if connect and (group is not None or dist.is_initialized()):
            self._connect(steps)
        else:  # no other rank is waiting for this one
            self.options = front_end.options(given)
            names_in(given)
            self._steps = steps or self._new_steps()

    def _new_steps(self) -> Steps | Conductor:
        if self.options.bits == "auto":
            return Conductor(self.options, self._stats, math.inf)
        return Steps(self.options.width, feedback=self.options.error_feedback)

    def _connect(self, steps: Steps | Conductor | None) -> BucketExchange | AutoBucketExchange:
        """Opens the connections, together with the other ranks."""
        given = self._group, self._front_end, self._given, self._stats
        exchange: BucketExchange | AutoBucketExchange
        if self._given.get("bits") == "auto":
            assert not isinstance(steps, Steps)
            exchange = AutoBucketExchange(*given, steps)
        else:
            assert not isinstance(steps, Conductor)
            exchange = BucketExchange(*given, steps)
        self._exchange, self.options, self._steps = exchange, exchange.options, exchange.steps
        return exchange

    def _connected(self) -> BucketExchange | AutoBucketExchange:
        """The connections to the ranks that there are now."""
        known = self._exchange
        if known is None or (self._group is None and known.group is not dist.group.WORLD):
            return self._connect(self._steps)
        return known

    @property
    def described(self) -> str:
        """The exchange; empty before the connections are opened."""
        return self._exchange.described if self._exchange is not None else ""

    @property
    def world_size(self) -> int | None:
        """Number of ranks; None before the connections are opened."""
        return self._exchange.size if self._exchange is not None else None

    def average(self, buffer: Tensor, first: bool) -> Future[Tensor]:
        """Starts averaging a buffer over the ranks, without blocking.

        All ranks must call this in the same order, with buffers of the same size and dtype.

        Args:
            buffer: a contiguous tensor of one dimension, or a sparse tensor of any shape. It must
                not be modified until the future is complete.
            first: whether the buffer begins a step.

        Returns:
            A future of ``buffer``, which then holds the mean; of a new tensor, if it is sparse.

        Raises:
            NotImplementedError: the buffer is on a device without kernels in this build.
            RuntimeError: the state was closed.
            ValueError: the buffer is on another GPU than the current one of the first bucket, or
                the state has error feedback, which takes the gradients of parameters.
            Exception: as raised by ``DDPState``, if this is the first bucket.
        """
        if self.options.error_feedback is not None:
            raise ValueError(
                f"error_feedback={self.options.error_feedback!r} takes the gradients of "
                "parameters, and average() gets a buffer of them: call average_bucket() with a "
                "bucket, or leave error_feedback and select='leader' out"
            )
        exchange = self._open_exchange()
        self._stats.tensors += 1
        return exchange.average(buffer, first)

    def _average(
        self, buffer: Tensor, first: bool, gradients: Callable[[], Sequence[tuple[Tensor, Tensor]]]
    ) -> Future[Tensor]:
        """``average``, with the parameters and gradients in the buffer, for error feedback."""
        if self.options.error_feedback is None:
            return self.average(buffer, first)
        exchange = self._open_exchange()
        assert isinstance(exchange, BucketExchange)
        each = gradients()
        self._stats.tensors += len(each)
        return exchange.average(buffer, first, each)

    def _open_exchange(self) -> BucketExchange | AutoBucketExchange:
        if self._closed:
            raise RuntimeError("the state of ddp_hook was closed: create another one")
        return self._connected()

    def average_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """Starts averaging a bucket. All models of one backward pass share a step.

        Args:
            bucket: the bucket that DDP passes to its hook.

        Returns:
            A future of the bucket's buffer, which then holds the mean.

        Raises:
            RuntimeError: the state was closed.
            Exception: as raised by ``average``.
        """
        first = bucket.index() == 0
        if first:
            backward = torch._C._current_graph_task_id()
            first = backward == NO_BACKWARD or backward != self._backward
            self._backward = backward
        return self._average(bucket.buffer(), first, lambda: gradients_of(bucket))

    def average_gradient(self, gradient: Tensor, parameter: Tensor) -> Future[Tensor]:
        """Averages a gradient in place, and blocks until it is the mean.

        Args:
            gradient: a tensor of any shape and layout, or a sparse tensor.
            parameter: the parameter of the gradient. A parameter that comes again begins a step.

        Returns:
            A completed future of the mean.

        Raises:
            RuntimeError: the state was closed.
            Exception: as raised by ``average``, or by the exchange.
        """
        first = not self._parameters or id(parameter) in self._parameters
        if first:
            self._parameters.clear()
        self._parameters.add(id(parameter))
        flat = gradient if gradient.is_sparse else gradient.contiguous().view(-1)
        future = self._average(flat, first, lambda: [(parameter, flat)])
        mean = future.wait()
        gradient.copy_(mean if mean.is_sparse else mean.view_as(gradient))
        return future

    def stats(self) -> Stats:
        """Returns a copy of this rank's counts of bytes and tensors."""
        with self._held():
            return dataclasses.replace(self._stats)

    def reset_stats(self) -> None:
        """Sets all counts to zero."""
        with self._held():
            self._stats.reset()

    def close(self) -> None:
        """Releases the connections to the next state, for programs that create many models.

        All ranks must call this, with no backward pass in progress. The state is unusable then.
        """
        if self._exchange is not None and not self._closed:
            self._exchange.close()
        self._closed = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of the next step and the schedule of ``DynamicBits``, as ints, and
        the memory of this rank with error feedback.

        See ``GlobalQSGD.state_dict``.
        """
        with self._held():
            return self._steps.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a result of ``state_dict``; the next step continues from this state.

        See ``GlobalQSGD.load_state_dict``.

        Args:
            state: a result of ``state_dict`` with the same kind of ``bits``.

        Raises:
            TypeError: the state is not a dict, or a value is not an int.
            ValueError: the state belongs to another kind of object.
        """
        with self._held():
            self._steps.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "front_end": self._front_end,
            "given": self._given,
            "stats": self.stats(),
            "steps": self.state_dict(),
            "of_default_group": self._group is None or self._group is dist.group.WORLD,
        }

    def __setstate__(self, saved: dict[str, Any]) -> None:
        # But for parameters: those of a copy are those of its model, if that was copied along.
        front_end, stats = saved["front_end"], saved["stats"]
        given = {
            name: value if name == "named_parameters" else copy.deepcopy(value)
            for name, value in saved["given"].items()
        }
        self._set_up(None, front_end, given, stats, None, connect=False)
        self.load_state_dict(saved["steps"])
        _log.log(
            logging.INFO if saved["of_default_group"] else logging.WARNING,
            "a copy of a DDPState has no connections: if it gets a bucket, it opens them on the "
            "default process group",
        )

    def __repr__(self) -> str:
        given = self.options.keywords(FRONT_END.without)
        if "named_parameters" in self._given:
            given += f", named_parameters=<{len(self._given['named_parameters'])} of them>"
        return f"{type(self).__name__}({given}){': ' * bool(self.described)}{self.described}"

    def _held(self) -> AbstractContextManager[None]:
        return self._exchange.held() if self._exchange is not None else contextlib.nullcontext()


GQSGDState = DDPState  # as PyTorch names its PowerSGDState


def ddp_hook(
    state: DDPState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future[Tensor]:
    """Averages a bucket of gradients over all ranks, exchanged as small integers.

    A communication hook for ``DistributedDataParallel.register_comm_hook``::

        model.register_comm_hook(DDPState(bits=8), ddp_hook)

    The hook is non-blocking: the exchange overlaps with the backward pass.

    Args:
        state: a :class:`DDPState`, or the result of ``GlobalQSGD.ddp_state``.
        bucket: the bucket that DDP passes; under compiled autograd, a gradient and its parameter.

    Returns:
        A future of the bucket's buffer, which then holds the mean. ``backward()`` raises an error
        of the exchange on all ranks, as a ``RuntimeError`` that quotes it.

    Raises:
        TypeError: ``state`` is of another class.
    """
    if not isinstance(state, DDPState):
        remedy = "; pass its ddp_state()" if hasattr(state, "ddp_state") else ""
        raise TypeError(
            "the state of ddp_hook must be a GQSGDState (DDPState), as GQSGDState(bits=8), got "
            f"{state!r}{remedy}"
        )
    if isinstance(bucket, tuple):
        # DDP under compiled autograd hands in the gradients one by one, expects the mean in their
        # place, and reads no future. Dynamo must not trace the rest.
        average: Callable[..., Future[Tensor]] = torch.compiler.disable(state.average_gradient)
        return average(*bucket)
    return state.average_bucket(bucket)
