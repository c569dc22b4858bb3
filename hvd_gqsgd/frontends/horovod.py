"""``GlobalQSGD``: the Horovod ``Compressor``, and the way to the other front ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.checks import check_number
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.front_end import FrontEnd, names_missing
from hvd_gqsgd.frontends.auto_horovod import AutoCompressor
from hvd_gqsgd.frontends.class_or_instance import ClassOrInstanceMethod
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.ddp import DDPState
from hvd_gqsgd.frontends.fsdp import attach
from hvd_gqsgd.frontends.horovod_exchange import Compressor, HorovodExchange, is_process_set
from hvd_gqsgd.frontends.parameter_names import ParameterNames, pairs
from hvd_gqsgd.option_types import Bits, OptionsButBits
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["GlobalQSGD"]

FRONT_END = FrontEnd(
    "GlobalQSGD()",
    own=("named_parameters", "process_set", "patience"),
    trains=True,
    knows_parameters=True,
)

PATIENCE = 30.0

_CALLS = ("compress", "decompress")
"""Called for each gradient."""


class GlobalQSGD(Compressor):
    """Horovod compressor that exchanges gradients as quantized integers.

    Use the class itself for the defaults, or an instance::

        opt = hvd.DistributedOptimizer(sgd, compression=GlobalQSGD)
        opt = hvd.DistributedOptimizer(sgd, compression=GlobalQSGD(bits=4, seed=7))

    All ranks must use the same options.

    Args:
        bits: lane width on the wire in bits per element, ``DynamicBits(...)``, ``BlockBits(...)``,
            or ``"auto"`` to measure settings, no compression among them, and take the fastest.
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
            ``named_parameters`` is empty, or is missing with error feedback.
    """

    _default_instance: ClassVar[GlobalQSGD]

    @FRONT_END.documented
    def __init__(
        self,
        bits: Bits = 8,
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
        elif self.options.error_feedback is not None:
            remedy = "GlobalQSGD(named_parameters=model.named_parameters())"
            raise ValueError(names_missing(self._given, remedy))
        if process_set is not None:
            if not is_process_set(process_set):
                raise TypeError(
                    "process_set must be a horovod.torch.ProcessSet or None (all ranks), got "
                    f"{process_set!r}"
                )
            self._given["process_set"] = process_set
        self._process_set = process_set
        self._described = ""  # the exchange of the last ddp_state()
        self._stats = Stats()
        self._steps: Steps | Conductor
        if self.options.bits == "auto":
            self._steps = Conductor(self.options, self._stats, self._patience)
        else:
            self._steps = Steps(self.options.width, feedback=self.options.error_feedback)
        self._begin()

    @classmethod
    def _default(cls) -> GlobalQSGD:
        if "_default_instance" not in cls.__dict__:  # a subclass has one of its own
            cls._default_instance = cls()
        return cls._default_instance

    @ClassOrInstanceMethod
    @opaque
    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
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
        return self._exchange.compress(tensor)

    @ClassOrInstanceMethod
    @opaque
    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
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
            ValueError: the tensor has no name, with error feedback; other ranks raise
                ``AgreementError`` if it has one there.
            RuntimeError: the context was used before, or belongs to another compressor.
            HorovodInternalError: Horovod could not complete the exchange.
        """
        return self._exchange.decompress(tensor, ctx)

    @ClassOrInstanceMethod
    def ddp_state(self, process_group: dist.ProcessGroup | None = None) -> DDPState:
        """Returns a state for ``ddp_hook`` with these options, for one model::

            model.register_comm_hook(GlobalQSGD(bits=8).ddp_state(), ddp_hook)

        See :class:`hvd_gqsgd.frontends.ddp.DDPState` for the requirements on ranks. ``stats`` of
        this compressor includes the counts of the hook.

        Args:
            process_group: the one that the model uses; None for the default group.

        Raises:
            TypeError: ``bucket_mb``, ``process_set`` or ``patience`` was given, none of which has
                an effect under DDP; or ``named_parameters``, without error feedback.
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
        self._count()
        return dataclasses.replace(self._stats)

    @ClassOrInstanceMethod
    def reset_stats(self) -> None:
        """Sets all counts to zero."""
        self._count()
        self._stats.reset()

    @ClassOrInstanceMethod
    def state_dict(self) -> dict[str, Any]:
        """Returns the number of the next step and the schedule of ``DynamicBits``, and the memory
        of this rank with error feedback.

        The number and the schedule are plain numbers, and the same on all ranks, so saving them on
        one rank is enough. Memory has tensors, and differs: with error feedback, save the state of
        each rank, and load it on the same rank. All front ends of the compressor share the state:
        Horovod, DDP by ``ddp_state()``, and FSDP by ``fsdp()``. A resumed training has the bits of
        an uninterrupted one; under DDP this requires ``find_unused_parameters=True``, as DDP
        otherwise reorders its buckets after the first step.
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
        self._exchange.restart()
        self._steps.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies have the options, the counts and the state of the training, but none
        of what is in flight."""
        self._count()
        here = {"_described": ""}
        in_flight = ("_exchange", *_CALLS)
        return {name: v for name, v in (self.__dict__ | here).items() if name not in in_flight}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def __repr__(self) -> str:
        given = [self.options.keywords()]
        if "named_parameters" in self._given:
            given.append(f"named_parameters=<{len(self._given['named_parameters'])} of them>")
        if self._process_set is not None:
            given.append(f"process_set={self._process_set}")
        if "patience" in self._given:
            given.append(f"patience={self._patience}")
        described = self._exchange.described or self._described
        return f"{type(self).__name__}({', '.join(given)}){': ' * bool(described)}{described}"

    def _begin(self) -> None:
        self._exchange: HorovodExchange | AutoCompressor
        if isinstance(self._steps, Steps):
            self._exchange = self._exchange_of(self.options, self._steps)
            return
        self._exchange = AutoCompressor(self._steps, self.options, self._stats, self._exchange_of)
        # Without this class in between, as a step without compression must not take longer; but not
        # where a subclass overrides them.
        for name in _CALLS:
            if getattr_static(self, name) is vars(GlobalQSGD)[name]:
                setattr(self, name, getattr(self._exchange, name))

    def _count(self) -> None:
        if isinstance(self._exchange, AutoCompressor):
            self._exchange.count_passed()

    def _exchange_of(self, options: Options, steps: Steps) -> HorovodExchange:
        return HorovodExchange(
            options, self._names, self._process_set, self._patience, self._stats, steps
        )
