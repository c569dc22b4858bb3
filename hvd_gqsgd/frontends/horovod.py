"""The Horovod ``Compressor``, with ``compress`` and ``decompress``.

``compress`` hands Horovod a probe in place of the gradient and starts the exchange of the gradient
itself. ``decompress`` reads the requested reduction from the reduced probe, waits for the exchange
and decodes the gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvd_gqsgd.checks import check_number
from hvd_gqsgd.codecs import check_device, check_plain, is_compressible
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
from hvd_gqsgd.frontends.bypass import nbytes_of, why_bypassed
from hvd_gqsgd.frontends.class_or_instance import ClassOrInstanceMethod
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.ddp import DDPState
from hvd_gqsgd.frontends.fsdp import attach
from hvd_gqsgd.frontends.horovod_probe import (
    PROBE_BYTES,
    Reading,
    disagreement,
    make_probe,
    with_shape,
)
from hvd_gqsgd.frontends.parameter_names import ParameterNames, pairs
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

FRONT_END = FrontEnd("GlobalQSGD()", own=("named_parameters", "process_set", "patience"))

PATIENCE = 30.0


class _Context(NamedTuple):
    """The context of a tensor, which ``decompress`` needs."""

    ticket: Ticket
    like: Tensor | None
    """The gradient, if its layout is not that of the result."""
    world_size: int


class GlobalQSGD(Compressor):
    """Horovod compressor that exchanges gradients as quantized integers.

    Use the class itself for the defaults, or an instance::

        opt = hvd.DistributedOptimizer(sgd, compression=GlobalQSGD)
        opt = hvd.DistributedOptimizer(sgd, compression=GlobalQSGD(bits=4, seed=7))

    All ranks must use the same options.

    Args:
        bits: lane width on the wire in bits per element, ``DynamicBits(...)`` or
            ``BlockBits(...)``.
        named_parameters: ``model.named_parameters()``. With names, the order of gradients may
            differ between ranks. Without names, the order identifies gradients, and a different
            order on another rank is an error.
        process_set: the Horovod process set given to ``hvd.DistributedOptimizer``; None for all
            ranks.
        patience: seconds that ``decompress`` waits for ranks that have not submitted the tensor,
            before it raises ``AgreementError``. Ranks that are in another process set never submit
            it. If some ranks have left by ``hvd.join()``, the others submit it by the end of the
            slowest backward pass: pass a larger value if ranks may be further apart.
        options: see :class:`hvd_gqsgd.options.Options`, also for ``bits``.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        ValueError: an option is out of range, does not go with another one, or has no effect here;
            or ``named_parameters`` is empty.
    """

    _default_instance: ClassVar[GlobalQSGD]

    @FRONT_END.documented
    def __init__(
        self,
        bits: int | DynamicBits | BlockBits = 8,
        *,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        process_set: Any = None,
        patience: float = PATIENCE,
        **options: Unpack[OptionsButBits],
    ) -> None:
        self._given: dict[str, Any] = {"bits": bits, **options}
        self.options = FRONT_END.options(self._given)
        self._patience = check_number("patience", patience, "a number of seconds")
        if not 0 < self._patience < math.inf:
            raise ValueError(f"patience must be a number of seconds above 0, got {patience!r}")
        if patience != PATIENCE:
            self._given["patience"] = patience
        self._names = None
        if named_parameters is not None:
            named = self._given["named_parameters"] = pairs(named_parameters)
            self._names = ParameterNames(named)
        if process_set is not None:
            if _no_horovod is None and not isinstance(process_set, ProcessSet):
                raise TypeError(
                    "process_set must be a horovod.torch.ProcessSet or None (all ranks), got "
                    f"{process_set!r}"
                )
            self._given["process_set"] = process_set
        self._process_set = process_set
        self._described = ""  # the exchange of the last ddp_state()
        self._stats = Stats()
        self._steps = Steps(self.options.bits)
        self._pipeline: Pipeline | None = None

    @classmethod
    def _default(cls) -> GlobalQSGD:
        if "_default_instance" not in cls.__dict__:  # a subclass has one of its own
            cls._default_instance = cls()
        return cls._default_instance

    @ClassOrInstanceMethod
    @opaque
    def compress(self, tensor: Tensor) -> tuple[Tensor, _Context | None]:
        """Starts the exchange of a gradient, without blocking.

        Args:
            tensor: a tensor of any shape and layout. It must not be modified until ``decompress``,
                and is never written to. Integer, complex and sparse tensors, tensors smaller than
                ``min_numel``, and tensors that autograd must differentiate through are not
                compressed.

        Returns:
            The tensor for Horovod to allreduce, a probe of 7 float64 numbers on the CPU, and the
            context for ``decompress``. ``tensor`` and None, if it is not compressed.

        Raises:
            ImportError: Horovod is not installed.
            TypeError: the tensor wraps others, as a DTensor does, or is within ``torch.func``.
            ValueError: ``bits`` is too small for the number of ranks.
            NotImplementedError: the tensor is on a device without kernels in this build.
        """
        self._stats.tensors += 1
        if not self._compresses(tensor):
            why = why_bypassed(tensor, self.options.min_numel) or "other"
            self._stats.bypass(why, nbytes_of(tensor), self._known_rank)
            return tensor, None
        check_plain("a gradient for GlobalQSGD", tensor)
        check_device("GlobalQSGD got a tensor", tensor)
        if self._pipeline is None:
            self._pipeline = self._start()
        name = self._names.find(tensor) if self._names is not None else None
        x = tensor.detach() if tensor.requires_grad else tensor
        like = None if x.is_contiguous() else x
        ticket = self._pipeline.submit(x if like is None else x.contiguous(), name)
        identity = with_shape(ticket.item.identity, tensor.shape)
        probe = make_probe(self._pipeline.rank, identity)
        if not self._pipeline.alone:
            self._stats.compressed_bytes_on_wire += PROBE_BYTES
        return probe, _Context(ticket, like, self._pipeline.size)

    @ClassOrInstanceMethod
    @opaque
    def decompress(self, tensor: Tensor, ctx: _Context | None) -> Tensor:
        """Waits for the exchange of a gradient and returns the result of the requested reduction.

        Args:
            tensor: the first value that ``compress`` returned, reduced by Horovod.
            ctx: the second value that ``compress`` returned. With None, ``tensor`` is returned.

        Returns:
            A tensor of the shape, dtype and device of the gradient. Its memory is reused only once
            nothing refers to the tensor.

        Raises:
            AgreementError: on all ranks, if the reduction is not linear (Min, Max, Product, Adasum)
                or is over other ranks than ``process_set``, or if ranks disagree on the options or
                the order of tensors.
            RuntimeError: the context was used before, or belongs to another compressor.
            HorovodInternalError: Horovod could not complete the exchange.
        """
        if ctx is None:
            return tensor
        if self._pipeline is None:
            raise RuntimeError("the context belongs to another compressor: call its decompress")
        reading, all_ranks = Reading.of(tensor), everyone(ctx.world_size)
        contribution: Contribution | None = all_ranks
        complete = reading.complete(all_ranks)
        if complete:
            contribution = self._pipeline.wait(ctx.ticket)
        elif not reading.matches(all_ranks):
            # Either ranks have left by hvd.join(), and the payload tells which, or there is no
            # right answer, and then the ranks of another process set may never send theirs.
            contribution = self._pipeline.wait(ctx.ticket, self._patience)
        if not (complete and contribution == all_ranks):
            problem = disagreement(reading, contribution, all_ranks)
            if problem is not None or contribution is None:
                self._pipeline.end_step(Ending.DISAGREEMENT)
                raise AgreementError(problem)
        scale = reading.scale(contribution.count, ctx.world_size)
        mean = self._pipeline.decode(ctx.ticket, scale)
        return mean if ctx.like is None else torch.empty_like(ctx.like).copy_(mean)

    @ClassOrInstanceMethod
    def ddp_state(self, process_group: dist.ProcessGroup | None = None) -> DDPState:
        """Returns a state for ``ddp_hook`` with these options, for one model::

            model.register_comm_hook(GlobalQSGD(bits=8).ddp_state(), ddp_hook)

        See :class:`hvd_gqsgd.frontends.ddp.DDPState` for the requirements on ranks. ``stats`` of
        this compressor includes the counts of the hook.

        Args:
            process_group: the one that the model uses; None for the default group.

        Raises:
            TypeError: ``bucket_mb``, ``named_parameters``, ``process_set`` or ``patience`` was
                given, none of which has an effect under DDP.
            Exception: as raised by ``DDPState``.
        """
        state = DDPState.of_compressor(process_group, self._given, self._stats, self._steps)
        self._described = state.described
        return state

    @ClassOrInstanceMethod
    def fsdp(
        self,
        model: nn.Module,
        *,
        replicate_group: dist.ProcessGroup | None = None,
        weight_bits: int | None = None,
        weight_exceptions: Iterable[str] = (),
    ) -> nn.Module:
        """Reduce-scatters the gradients of a model of ``fully_shard`` as integers::

            model = GlobalQSGD(bits=8).fsdp(fully_shard(model), weight_bits=8)

        All ranks must call this together. ``stats`` includes the counts of FSDP.

        Args:
            model: a model with ``fully_shard`` applied to it or to modules in it.
            replicate_group: the ranks that hold the same shard, for HSDP; None for no replicas.
            weight_bits: lane width of gathered weights, from 2 to 16; None gathers exact weights.
            weight_exceptions: names of parameters that are gathered exactly, or patterns of
                ``fnmatch``, as ``("*embed*", "head.weight")``.

        Returns:
            ``model``, modified in place.

        Raises:
            TypeError: no module has ``fully_shard``, or an option has the wrong type or no effect.
            ValueError: an option or the mesh is not supported, or no weight is left to round.
            NotImplementedError: PyTorch is older than 2.9.
            AgreementError: on all ranks, if options differ or another rank raises an error.
        """
        attach(
            model, self._given, self._stats, self._steps, replicate_group=replicate_group,
            weight_bits=weight_bits, weight_exceptions=weight_exceptions,
        )  # fmt: skip
        return model

    @ClassOrInstanceMethod
    def stats(self) -> Stats:
        """Returns a copy of this rank's counts of bytes and tensors."""
        return dataclasses.replace(self._stats)

    @ClassOrInstanceMethod
    def reset_stats(self) -> None:
        """Sets all counts to zero."""
        self._stats.reset()

    @ClassOrInstanceMethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the number of the next step and the schedule of ``DynamicBits``.

        Both are plain numbers. All front ends of the compressor share the state: Horovod, DDP by
        ``ddp_state()``, and FSDP by ``fsdp()``. The state is the same on all ranks, so saving it on
        one rank is enough. A resumed training has the bits of an uninterrupted one; under DDP this
        requires ``find_unused_parameters=True``, as DDP otherwise reorders its buckets after the
        first step.
        """
        return self._steps.state_dict()

    @ClassOrInstanceMethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a result of ``state_dict``; the next step continues from this state.

        Call it before or after ``ddp_state()``. A rank that does not call this, such as a
        worker that joins later, adopts the state of the others.

        Args:
            state: a result of ``state_dict`` with the same kind of ``bits``.

        Raises:
            TypeError: the state is not a dict, or a value is not an int.
            ValueError: the state belongs to another kind of object.
            RuntimeError: gradients are in flight.
        """
        if self._pipeline is not None:
            self._pipeline.restart()  # an exception's frames may hold tickets of a former session
        self._steps.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies have the options, the counts and the state of the training, but none
        of what is in flight."""
        here = {"_pipeline": None, "_described": ""}
        return {name: v for name, v in (self.__dict__ | here).items() if name != "_transport"}

    def __repr__(self) -> str:
        given = [self.options.keywords()]
        if "named_parameters" in self._given:
            given.append(f"named_parameters=<{len(self._given['named_parameters'])} of them>")
        if self._process_set is not None:
            given.append(f"process_set={self._process_set}")
        if "patience" in self._given:
            given.append(f"patience={self._patience}")
        described = self._pipeline.describe() if self._pipeline is not None else self._described
        return f"{type(self).__name__}({', '.join(given)}){': ' * bool(described)}{described}"

    @functools.cached_property
    def _transport(self) -> HorovodTransport:
        if _no_horovod is not None:
            raise ImportError("GlobalQSGD.compress needs Horovod") from _no_horovod
        if self._process_set is None:
            return HorovodTransport()
        return HorovodTransport(self._process_set)

    def _known_rank(self) -> int:
        """This rank; -1 where Horovod has an error of its own for the tensor: before ``hvd.init()``
        and outside of the process set."""
        try:
            return self._transport.rank
        except (TypeError, ValueError):
            return -1

    def _compresses(self, tensor: Tensor) -> bool:
        return (
            tensor.layout == torch.strided
            and self._is_large(tensor)
            # A result of hvd.allreduce() that is differentiated needs Horovod's autograd function.
            and not (tensor.requires_grad and torch.is_grad_enabled())
            # Horovod has its own error for a tensor from a process outside of the process set.
            and (self._process_set is None or self._transport.included)
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
