"""The Horovod ``Compressor``: ``compress``, ``decompress``, and nothing else of weight.

``compress`` hands Horovod a probe in place of the gradient and starts the exchange of the gradient
itself; ``decompress`` reads from the reduced probe what Horovod was asked to do, waits for the
exchange and makes the gradient.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, ClassVar, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.codecs import check_device, is_compressible
from hvd_gqsgd.codecs.bit_schedule import DynamicBits
from hvd_gqsgd.engine.buckets import Contribution, everyone
from hvd_gqsgd.engine.operation_names import Namespace
from hvd_gqsgd.engine.pipeline import Pipeline, Ticket
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.errors import GAVE_UP, AgreementError
from hvd_gqsgd.exchanges import ORDER
from hvd_gqsgd.frontends.ddp import DDPState
from hvd_gqsgd.frontends.horovod_probe import PROBE_BYTES, Reading, make_probe
from hvd_gqsgd.frontends.parameter_names import ParameterNames
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.host_staging import StagedTransport

try:
    from horovod.torch.compression import Compressor

    from hvd_gqsgd.transports.horovod import HorovodTransport
except ImportError as error:
    # DistributedDataParallel does not need it.
    Compressor = object
    _no_horovod: ImportError | None = error
else:
    _no_horovod = None

__all__ = ["GlobalQSGD"]

# Seconds to wait for a payload when not all ranks are behind a probe. All ranks that are have sent
# their part already, or will at the end of their backward pass.
PATIENCE = 30.0

# By process set, and by the names of the parameters if there are any: not all ranks are in every
# process set, and with names two compressors may be used in another order on another rank.
_namespaces: dict[tuple[Any, str], Namespace] = {}

P = ParamSpec("P")
R = TypeVar("R")


class _ClassOrInstanceMethod(Generic[P, R]):
    """A method that, called on the class, works on its default instance.

    Horovod's own compressors are classes with static methods, and ``compression=GlobalQSGD`` is
    what its users would write.
    """

    def __init__(self, method: Callable[Concatenate[GlobalQSGD, P], R]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: GlobalQSGD | None, owner: type[GlobalQSGD]) -> Callable[P, R]:
        bound = instance if instance is not None else owner._default()

        return MethodType(self._method, bound)


class _Context(NamedTuple):
    """What ``decompress`` needs to know of a tensor."""

    ticket: Ticket
    like: Tensor
    world_size: int


class GlobalQSGD(Compressor):
    """Sums gradients as quantized integers, inside Horovod's own allreduce.

    Use the class itself for the defaults, or an instance::

        opt = hvd.DistributedOptimizer(opt, named_parameters=model.named_parameters(),
                                       compression=GlobalQSGD)
        opt = hvd.DistributedOptimizer(opt, named_parameters=model.named_parameters(),
                                       compression=GlobalQSGD(bits=4, seed=7))

    All options must be the same on all ranks.

    Args:
        bits: lane width on the wire, 2 to 16 bits per element; 4 or 8 for exponential dithering. Or
            ``DynamicBits(...)``: a width that follows the training, by DQ-SGD.
        dither: "linear": evenly spaced levels, s to each side; or "exponential": each level twice
            the one below, so that small elements keep their relative precision.
        exchange: "allreduce": codes are summed as integers by an ordinary Allreduce, and there are
            s = floor((2^bits - 1) / (2 * ranks)) levels; "two_phase": by Alltoall, a sum on each
            rank of its part, and Allgather, with s = 2^(bits - 1) - 1 for any number of ranks; or
            "auto": two phases for exponential dithering, and where lanes that hold a sum would
            leave less than 7 levels.
        norm: of a block over all ranks: "max", the largest magnitude, or "l2".
        block_size: consecutive elements that share a norm; None for one norm per tensor.
        correlated: draw the dither of the ranks from strata of one shared number, so that their
            rounding errors cancel; False for independent dither.
        seed: of the dither. The same seed and gradients give the same bits.
        min_numel: tensors with fewer elements go to Horovod as they are, if it can reduce them:
            not if they are of bfloat16 or not contiguous.
        bucket_mb: megabytes of gradients that are exchanged in one message.
        named_parameters: ``model.named_parameters()``; lets gradients come in another order on
            another rank. Without it they are told apart by their order of arrival, and a difference
            is an error.
        process_set: the Horovod process set that the gradients are reduced over, as given to
            ``hvd.DistributedOptimizer``; None for all ranks.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range.
    """

    _default_instance: ClassVar[GlobalQSGD]

    def __init__(
        self,
        bits: int | DynamicBits = 8,
        *,
        dither: str = "linear",
        exchange: str = "auto",
        norm: str = "max",
        block_size: int | None = 1024,
        correlated: bool = True,
        seed: int = 0,
        min_numel: int = 4096,
        bucket_mb: float = 25,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        process_set: Any = None,
    ) -> None:
        self.options = Options(
            bits=bits,
            dither=dither,
            exchange=exchange,
            norm=norm,
            block_size=block_size,
            correlated=correlated,
            seed=seed,
            min_numel=min_numel,
            bucket_mb=bucket_mb,
        )
        self._names = ParameterNames(named_parameters) if named_parameters is not None else None
        self._process_set = process_set
        self._stats = Stats()
        self._state: dict[str, Any] | None = None  # loaded before the first step
        self._pipeline: Pipeline | None = None

    @classmethod
    def _default(cls) -> GlobalQSGD:
        if "_default_instance" not in cls.__dict__:  # a subclass has one of its own
            cls._default_instance = cls()
        return cls._default_instance

    @_ClassOrInstanceMethod
    def compress(self, tensor: Tensor) -> tuple[Tensor, _Context | None]:
        """Starts the exchange of a gradient and returns at once.

        Args:
            tensor: of any shape and layout. It must stay as it is until ``decompress``; it is never
                written to. Integer, complex and sparse tensors, those smaller than ``min_numel``,
                and those that autograd must differentiate through are not compressed.

        Returns:
            What Horovod is to allreduce instead of it, and the context for ``decompress``.

        Raises:
            ValueError: ``bits`` is too small for the number of ranks.
            NotImplementedError: the tensor is on a device for which there are no kernels.
        """
        self._stats.tensors += 1
        if not self._compresses(tensor):
            self._stats.tensors_bypassed += 1
            self._stats.bypassed_bytes += _nbytes(tensor)
            return tensor, None
        check_device("GlobalQSGD got a tensor", tensor)
        if self._pipeline is None:
            self._pipeline = self._start()
        name = self._names.find(tensor) if self._names is not None else None
        flat = tensor.detach().contiguous().view(-1)
        ticket = self._pipeline.submit(flat, name)
        identity = digest((ticket.item.identity, *tensor.shape))
        probe = make_probe(self._transport.rank, identity)
        self._stats.compressed_bytes_on_wire += PROBE_BYTES
        return probe, _Context(ticket, tensor.detach(), self._transport.size)

    @_ClassOrInstanceMethod
    def decompress(self, tensor: Tensor, ctx: _Context | None) -> Tensor:
        """Waits for the exchange of a gradient and returns what Horovod was asked for.

        Args:
            tensor: what Horovod made of the first value that ``compress`` returned.
            ctx: the second one. With None, ``tensor`` is returned.

        Returns:
            A tensor of the shape, dtype and device of the gradient, in memory that is used for
            another one only after nothing refers to it any more.

        Raises:
            AgreementError: the reduction is not linear (Min, Max, Product, Adasum), is over other
                ranks than ``process_set``, or the ranks disagree on the options or the order of
                tensors. It is raised on all ranks.
            HorovodInternalError: Horovod could not complete the exchange.
        """
        if ctx is None:
            return tensor
        assert self._pipeline is not None, "the context is another compressor's"
        reading = Reading.of(tensor)
        contribution: Contribution | None = everyone(ctx.world_size)
        if not reading.matches(everyone(ctx.world_size)):
            # Either ranks have left by hvd.join(), and the payload tells which, or there is no
            # right answer, and then the ranks of another process set may never send theirs.
            contribution = self._pipeline.wait(ctx.ticket, PATIENCE)
        elif reading.same_tensor():
            contribution = self._pipeline.wait(ctx.ticket)
        problem = _problem(reading, contribution, everyone(ctx.world_size))
        if problem is not None or contribution is None:
            self._pipeline.abandon()
            raise AgreementError(problem)
        scale = reading.scale(contribution.count, ctx.world_size)
        flat = self._pipeline.decode(ctx.ticket, scale)
        if ctx.like.is_contiguous():
            return flat.view(ctx.like.shape)
        return torch.empty_like(ctx.like).copy_(flat.view(ctx.like.shape))

    def ddp_state(self, process_group: dist.ProcessGroup | None = None) -> DDPState:
        """The state for ``hvd_gqsgd.ddp_hook``, for one model::

            model.register_comm_hook(GlobalQSGD(bits=8).ddp_state(), hvd_gqsgd.ddp_hook)

        All ranks of the process group must call it, as it makes process groups of its own: one for
        each kind of message. DDP's buckets take the place of tensors: ``bucket_mb`` and
        ``named_parameters`` do not count, and ``min_numel`` is about a whole bucket. ``stats``
        counts what the hook does.

        Args:
            process_group: the one that the model was given; None for all ranks.

        Raises:
            ValueError: ``bits`` is too small for the number of ranks, or this process is not in the
                process group.
        """
        return DDPState(self.options, process_group, self._stats)

    @_ClassOrInstanceMethod
    def stats(self) -> Stats:
        """Bytes before and on the wire, ratio and bypassed tensors so far; of this rank."""
        return dataclasses.replace(self._stats)

    @_ClassOrInstanceMethod
    def state_dict(self) -> dict[str, Any]:
        """The number of the next step, and the schedule of ``DynamicBits``, for a checkpoint.

        Plain numbers. All ranks have the same; it is enough to save that of one.
        """
        if self._pipeline is None:
            state = self._state or Steps(self.options.bits).state_dict()
            return copy.deepcopy(state)
        return self._pipeline.state_dict()

    @_ClassOrInstanceMethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on, with the next step, from what ``state_dict`` gave.

        A rank that does not, as a worker that joins later, takes over the state of the others.

        Raises:
            TypeError: it is not a dict, or a value is not an int.
            ValueError: it is the state of something else.
            RuntimeError: gradients are in flight.
        """
        Steps(self.options.bits).load_state_dict(state)  # raises here, not later
        if self._pipeline is not None:
            self._pipeline.load_state_dict(state)
        self._state = copy.deepcopy(state)

    @functools.cached_property
    def _transport(self) -> HorovodTransport:
        if _no_horovod is not None:
            raise ImportError("GlobalQSGD.compress needs Horovod") from _no_horovod
        return HorovodTransport(self._process_set) if self._process_set else HorovodTransport()

    def _compresses(self, tensor: Tensor) -> bool:
        return (
            tensor.layout == torch.strided
            and self._is_large(tensor)
            # A result of hvd.allreduce() that is differentiated needs Horovod's autograd function.
            and not (tensor.requires_grad and torch.is_grad_enabled())
            # Horovod has its own error for a tensor from a process outside of the process set.
            and self._transport.included
        )

    def _is_large(self, tensor: Tensor) -> bool:
        """Whether a gradient is worth it, or has no other way; the same for its parameter."""
        return is_compressible(tensor.dtype) and (
            tensor.numel() >= self.options.min_numel or not self._transport.takes(tensor)
        )

    def _start(self) -> Pipeline:
        label, plan = "gqsgd", None
        if self._names is not None:
            label = f"gqsgd-{self._names.digest():08x}"
            plan = self._names.plan(self.options, self._is_large)
        key = (self._transport.process_set, label)
        transport = self._transport
        pipeline = Pipeline(
            self.options,
            transport if transport.takes_gpu_tensors else StagedTransport(transport),
            namespace=_namespaces.setdefault(key, Namespace(key[1])),
            plan=plan,
            stats=self._stats,
        )
        if self._state is not None:
            pipeline.load_state_dict(self._state)
        return pipeline


def _problem(
    reading: Reading, contribution: Contribution | None, everyone: Contribution
) -> str | None:
    """Why there is no right answer, if so; the same on all ranks."""
    if contribution != everyone and reading.matches(everyone):
        return GAVE_UP  # all have sent a probe, and not all a payload
    if contribution is None or not reading.matches(contribution):
        return (
            "GlobalQSGD needs a linear reduction (op=hvd.Average or hvd.Sum, with any scale "
            "factors) over the ranks of its process_set. Got another one: op=hvd.Min, Max, Product "
            "or Adasum, or a process_set that GlobalQSGD(process_set=...) was not given"
        )
    if not reading.same_tensor():
        return f"the ranks compress tensors of other shapes or types, or in another order; {ORDER}"
    return None


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout == torch.strided:
        return tensor.nbytes
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.numel() * tensor.element_size()
