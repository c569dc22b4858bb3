"""The Horovod ``Compressor``: ``compress``, ``decompress``, and nothing else of weight.

``compress`` hands Horovod a probe in place of the gradient and starts the exchange of the gradient
itself; ``decompress`` reads from the reduced probe what Horovod was asked to do, waits for the
exchange and makes the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Concatenate,
    Generic,
    NamedTuple,
    ParamSpec,
    TypeVar,
)

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.codecs import check_device, is_compressible
from hvd_gqsgd.codecs.bit_schedule import DynamicBits
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.engine.failures import Ending
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.engine.operation_slots import SlotFilling
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.frontends.ddp import DDPState
from hvd_gqsgd.frontends.horovod_probe import (
    PROBE_BYTES,
    Reading,
    disagreement,
    make_probe,
    with_shape,
)
from hvd_gqsgd.frontends.parameter_names import ParameterNames
from hvd_gqsgd.options import FrontEnd, OptionsButBits
from hvd_gqsgd.registry import of_horovod
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.host_staging import StagedTransport

try:
    from horovod.torch import ProcessSet
    from horovod.torch.compression import Compressor

    from hvd_gqsgd.transports.horovod import SLOT_BYTES, HorovodTransport
except ImportError as error:
    # DistributedDataParallel does not need it.
    Compressor = object
    _no_horovod: ImportError | None = error
else:
    _no_horovod = None

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GlobalQSGD"]

FRONT_END = FrontEnd("GlobalQSGD()", own=("named_parameters", "process_set"))

# Seconds to wait for a payload when not all ranks are behind a probe. All ranks that are have sent
# their part already, or will at the end of their backward pass.
PATIENCE = 30.0

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
    """Horovod compressor that sums gradients as quantized integers inside Allreduce.

    Use the class itself for the defaults, or an instance::

        opt = hvd.DistributedOptimizer(opt, named_parameters=model.named_parameters(),
                                       compression=GlobalQSGD)
        opt = hvd.DistributedOptimizer(opt, named_parameters=model.named_parameters(),
                                       compression=GlobalQSGD(bits=4, seed=7))

    All ranks must use the same options.

    Args:
        bits: lane width on the wire in bits per element, ``DynamicBits(...)`` or
            ``BlockBits(...)``.
        named_parameters: ``model.named_parameters()``. With names, the order of gradients may
            differ between ranks. Without names, gradients are identified by their order, and ranks
            with another order are an error.
        process_set: the Horovod process set given to ``hvd.DistributedOptimizer``; None for all
            ranks.
        options: see :class:`hvd_gqsgd.options.Options`, also for ``bits``.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of range, does not go with another one, or has no effect here;
            or ``named_parameters`` is an iterator without elements.
    """

    _default_instance: ClassVar[GlobalQSGD]

    @FRONT_END.documented
    def __init__(
        self,
        bits: int | DynamicBits | BlockBits = 8,
        *,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        process_set: Any = None,
        **options: Unpack[OptionsButBits],
    ) -> None:
        self._given: dict[str, Any] = {"bits": bits, **options}
        self.options = FRONT_END.options(self._given)
        self._names = None
        if named_parameters is not None:
            if not isinstance(named_parameters, Iterable):
                raise TypeError(
                    "named_parameters must be pairs as from model.named_parameters(), got "
                    f"{named_parameters!r}"
                )
            named = self._given["named_parameters"] = list(named_parameters)
            if isinstance(named_parameters, Iterator) and not named:
                raise ValueError(
                    "GlobalQSGD() got named_parameters that yield nothing: an iterator that was "
                    "used before does not start again, so give it model.named_parameters() anew"
                )
            self._names = ParameterNames(named)
        if process_set is not None:
            if _no_horovod is None and not isinstance(process_set, ProcessSet):
                raise TypeError(
                    "process_set must be a horovod.torch.ProcessSet or None (all ranks), got "
                    f"{process_set!r}"
                )
            self._given["process_set"] = process_set
        self._process_set = process_set
        self._world_size: int | None = None  # of the last exchange
        self._stats = Stats()
        self._steps = Steps(self.options.bits)
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
        like = tensor.detach()
        ticket = self._pipeline.submit(like.contiguous().view(-1), name)
        identity = with_shape(ticket.item.identity, tensor.shape)
        probe = make_probe(self._pipeline.rank, identity)
        self._stats.compressed_bytes_on_wire += PROBE_BYTES
        self._world_size = self._pipeline.size
        return probe, _Context(ticket, like, self._world_size)

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
            RuntimeError: the context was used before, or is another compressor's.
            HorovodInternalError: Horovod could not complete the exchange.
        """
        if ctx is None:
            return tensor
        if self._pipeline is None:
            raise RuntimeError("the context is another compressor's: decompress it with that one")
        reading = Reading.of(tensor)
        contribution: Contribution | None = everyone(ctx.world_size)
        of_all, of_one = reading.matches(everyone(ctx.world_size)), reading.same_tensor()
        if not of_all:
            # Either ranks have left by hvd.join(), and the payload tells which, or there is no
            # right answer, and then the ranks of another process set may never send theirs.
            contribution = self._pipeline.wait(ctx.ticket, PATIENCE)
        elif of_one:
            contribution = self._pipeline.wait(ctx.ticket)
        complete = of_all and of_one and contribution == everyone(ctx.world_size)
        problem = (
            None if complete else disagreement(reading, contribution, everyone(ctx.world_size))
        )
        if problem is not None or contribution is None:
            self._pipeline.end_step(Ending.DISAGREEMENT)
            raise AgreementError(problem)
        scale = reading.scale(contribution.count, ctx.world_size)
        flat = self._pipeline.decode(ctx.ticket, scale)
        if ctx.like.is_contiguous():
            return flat.view(ctx.like.shape)
        return torch.empty_like(ctx.like).copy_(flat.view(ctx.like.shape))

    def ddp_state(self, process_group: dist.ProcessGroup | None = None) -> DDPState:
        """Returns a state for ``ddp_hook`` with these options, for one model::

            model.register_comm_hook(GlobalQSGD(bits=8).ddp_state(), ddp_hook)

        It is a :class:`hvd_gqsgd.frontends.ddp.DDPState`, which says what it expects of the ranks.
        ``stats`` counts what the hook does.

        Args:
            process_group: the one that the model uses; None for the default group.

        Raises:
            TypeError: ``bucket_mb``, ``named_parameters`` or ``process_set`` was given, which have
                no effect under DDP.
            Exception: as raised by ``DDPState``.
        """
        state = DDPState.of_compressor(process_group, self._given, self._stats, self._steps)
        self._world_size = state.world_size
        return state

    @_ClassOrInstanceMethod
    def stats(self) -> Stats:
        """Returns a copy of this rank's counts of bytes and tensors."""
        return dataclasses.replace(self._stats)

    @_ClassOrInstanceMethod
    def reset_stats(self) -> None:
        """Sets all counts to zero."""
        self._stats.reset()

    @_ClassOrInstanceMethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the number of the next step and the schedule of ``DynamicBits``.

        Both are plain numbers. The state is that of the training, whichever front end is used:
        Horovod, or DDP by ``ddp_state()``. All ranks have the same; it is enough to save that of
        one. A resumed training has the bits of an uninterrupted one; under DDP only with
        ``find_unused_parameters=True``, as DDP otherwise reorders its buckets after the first
        step.
        """
        return self._steps.state_dict()

    @_ClassOrInstanceMethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a result of ``state_dict``; the next step continues from it.

        Call it before or after ``ddp_state()``. A rank that does not call it, as a worker that
        joins later, takes over the state of the others.

        Raises:
            TypeError: it is not a dict, or a value is not an int.
            ValueError: it is the state of something else.
            RuntimeError: gradients are in flight.
        """
        if self._pipeline is not None:
            self._pipeline.restart()  # an exception's frames may hold tickets of a former session
        self._steps.load_state_dict(state)

    def __repr__(self) -> str:
        given = [self.options.keywords()]
        if "named_parameters" in self._given:
            given.append(f"named_parameters=<{len(self._given['named_parameters'])} of them>")
        if self._process_set is not None:
            given.append(f"process_set={self._process_set}")
        known = self._world_size
        described = f": {self.options.describe(known)}" if known is not None else ""
        return f"{type(self).__name__}({', '.join(given)}){described}"

    @functools.cached_property
    def _transport(self) -> HorovodTransport:
        if _no_horovod is not None:
            raise ImportError("GlobalQSGD.compress needs Horovod") from _no_horovod
        if self._process_set is None:
            return HorovodTransport()
        return HorovodTransport(self._process_set)

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
        transport = self._transport
        # By process set and label: not all ranks are in every process set, and with names two
        # compressors may be used in another order on another rank.
        key = ("names", transport.process_set, label)
        return Pipeline(
            self.options,
            transport if transport.takes_gpu_tensors else StagedTransport(transport),
            steps=self._steps,
            names=of_horovod(key, lambda: OperationNames(label)),
            plan=plan,
            slot_filling=SlotFilling(transport.fill_slot, SLOT_BYTES),
            stats=self._stats,
        )


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout == torch.strided:
        return tensor.nbytes
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    return tensor.numel() * tensor.element_size()
