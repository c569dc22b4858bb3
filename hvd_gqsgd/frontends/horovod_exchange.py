"""The exchange of gradients under Horovod, with one setting.

``compress`` hands Horovod a probe in place of the gradient and starts the exchange of the gradient
itself. ``decompress`` reads the requested reduction from the reduced probe, waits for the exchange
and decodes the gradient.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.codecs import check_device, check_plain, is_compressible
from hvd_gqsgd.engine.failures import Ending
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.engine.operation_slots import SlotFilling
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.frontends.bypass import nbytes_of, why_bypassed
from hvd_gqsgd.frontends.horovod_probe import (
    PROBE_BYTES,
    Reading,
    disagreement,
    identity_of,
    make_probe,
)
from hvd_gqsgd.frontends.parameter_names import ParameterNames
from hvd_gqsgd.options import Options
from hvd_gqsgd.registry import of_horovod
from hvd_gqsgd.stats import Reason, Stats
from hvd_gqsgd.transports.host_staging import StagedTransport

try:
    from horovod.torch import ProcessSet
    from horovod.torch.compression import Compressor

    from hvd_gqsgd.transports.horovod import SLOT_BYTES, HorovodTransport, held
except ImportError as error:
    # DistributedDataParallel does not need it.
    Compressor = object
    NO_HOROVOD: ImportError | None = error
else:
    NO_HOROVOD = None

__all__ = ["NO_HOROVOD", "Compressor", "HorovodExchange", "is_process_set"]


class _Context(NamedTuple):
    """The context of a tensor, which ``decompress`` needs."""

    ticket: Ticket | None
    """None: this rank does not exchange the tensor, and ``decompress`` raises."""
    like: Tensor | None
    """The gradient, if its layout is not that of the result."""
    world_size: int
    held: Tensor
    """Holds the probe, as ``transports.horovod`` holds tensors in flight."""


class _Numbers:
    """Counts from 0 in each session."""

    def __init__(self) -> None:
        self._session: object = None
        self._next = 0

    def next(self, session: object) -> int:
        """Returns the next number in the session."""
        if session is not self._session:
            self._session, self._next = session, 0
        self._next += 1
        return self._next - 1


def is_process_set(value: object) -> bool:
    """Whether it is one of Horovod's; True without Horovod, which cannot tell."""
    return NO_HOROVOD is not None or isinstance(value, ProcessSet)


class HorovodExchange:
    """The gradients of one compressor in flight.

    Args:
        options: the options, with a width.
        names: the names of parameters; None: gradients are identified by their order.
        process_set: the ranks; None for all.
        patience: see ``GlobalQSGD``.
        stats: counts bytes and tensors.
        steps: the state of the training.
    """

    def __init__(
        self,
        options: Options,
        names: ParameterNames | None,
        process_set: Any,
        patience: float,
        stats: Stats,
        steps: Steps,
    ) -> None:
        self.options = options
        self.steps = steps
        self._names = names
        self._process_set = process_set
        self._patience = patience
        self._stats = stats
        self._pipeline: Pipeline | None = None
        self._refused = ""  # the error of a tensor of this step

    @functools.cached_property
    def transport(self) -> HorovodTransport:
        """Horovod's collectives.

        Raises:
            ImportError: Horovod is not installed.
        """
        if NO_HOROVOD is not None:
            raise ImportError("GlobalQSGD.compress needs Horovod") from NO_HOROVOD
        if self._process_set is None:
            return HorovodTransport()
        return HorovodTransport(self._process_set)

    @property
    def described(self) -> str:
        """The exchange; empty before the first gradient."""
        return self._pipeline.describe() if self._pipeline is not None else ""

    def compress(self, tensor: Tensor) -> tuple[Tensor, _Context | None]:
        """See ``GlobalQSGD.compress``."""
        return self.start(tensor) if self.compresses(tensor) else (self.bypass(tensor), None)

    def bypass(self, tensor: Tensor, why: Reason | None = None) -> Tensor:
        """Counts a gradient that goes uncompressed, and returns it; None: finds out the reason."""
        self._stats.tensors += 1
        why = why or why_bypassed(tensor, self.options.min_numel) or "other"
        self._stats.bypass(why, nbytes_of(tensor), self._known_rank)
        return tensor

    def start(self, tensor: Tensor) -> tuple[Tensor, _Context]:
        """Starts the exchange of a gradient that is compressed; see ``GlobalQSGD.compress``."""
        self._stats.tensors += 1
        check_plain("a gradient for GlobalQSGD", tensor)
        check_device("GlobalQSGD got a tensor", tensor)
        if self._pipeline is None:
            self._pipeline = self._start()
        name = self._names.find(tensor) if self._names is not None else None
        if name is None and self.options.error_feedback is not None:
            return self._refuse(tensor)
        x = tensor.detach() if tensor.requires_grad else tensor
        like = None if x.is_contiguous() else x
        ticket = self._pipeline.submit(x if like is None else x.contiguous(), name)
        identity = identity_of(ticket.item.identity, tensor.shape, ticket.bucket.name)
        probe = make_probe(self._pipeline.rank, identity)
        if not self._pipeline.alone:
            self._stats.compressed_bytes_on_wire += PROBE_BYTES
        return probe, _Context(ticket, like, self._pipeline.size, held(probe))

    def _refuse(self, tensor: Tensor) -> tuple[Tensor, _Context]:
        """Hands Horovod a probe of no tensor, so that other ranks do not wait for this one."""
        assert self._pipeline is not None
        self._refused = (
            "error feedback takes the gradients of named_parameters alone, got another tensor of "
            f"shape {tuple(tensor.shape)}: pass its parameter in named_parameters, or reduce it "
            "without compression"
        )
        probe = make_probe(self._pipeline.rank, identity_of(-1, tensor.shape, "refused"))
        return probe, _Context(None, None, self._pipeline.size, held(probe))

    def decompress(self, tensor: Tensor, ctx: _Context | None) -> Tensor:
        """See ``GlobalQSGD.decompress``."""
        if ctx is None:
            return tensor
        if self._pipeline is None:
            raise RuntimeError("the context belongs to another compressor: call its decompress")
        reading, all_ranks = Reading.of(tensor), everyone(ctx.world_size)
        contribution: Contribution | None = all_ranks
        complete = reading.complete(all_ranks) and ctx.ticket is not None
        if ctx.ticket is None:
            contribution = None
        elif complete:
            contribution = self._pipeline.wait(ctx.ticket)
        elif reading.same_tensor() and not reading.matches(all_ranks):
            # Either ranks have left by hvd.join(), and the payload tells which, or there is no
            # right answer, and then the ranks of another process set may never send theirs.
            contribution = self._pipeline.wait(ctx.ticket, self._patience)
        if not (complete and contribution == all_ranks):
            problem = disagreement(reading, contribution)
            if problem is not None or contribution is None:
                self._pipeline.end_step(Ending.DISAGREEMENT)
                if not reading.same_tensor():
                    # Their counts may have differed: all go on from a number in common.
                    self._operation_names.failures = reading.digest()
                    problem = f"{problem}. This rank has {self.options.keywords()}"
                if self._refused:
                    problem, self._refused = self._refused, ""
                    raise ValueError(problem)
                raise AgreementError(problem)
        assert ctx.ticket is not None
        scale = reading.scale(contribution.count, ctx.world_size)
        mean = self._pipeline.decode(ctx.ticket, scale)
        return mean if ctx.like is None else torch.empty_like(ctx.like).copy_(mean)

    def label(self, of: str, session: object) -> str:
        """Begins the names of operations beside those of the exchange: one that no other compressor
        of a session gets, and the same on all ranks, those that joined later among them."""
        label = of if self._names is None else f"{of}-{self._names.digest():08x}"
        numbers = of_horovod(("labels", self.transport.process_set, label), _Numbers)
        return f"{label}.{numbers.next(session)}"

    def restart(self) -> None:
        """Ends the step of a session that has ended: an exception's frames may hold its tickets."""
        if self._pipeline is not None:
            self._pipeline.restart()

    def compresses(self, tensor: Tensor) -> bool:
        """Whether a gradient is compressed; the same on all ranks."""
        return (
            tensor.layout == torch.strided
            and self._is_large(tensor)
            # A result of hvd.allreduce() that is differentiated needs Horovod's autograd function.
            and not (tensor.requires_grad and torch.is_grad_enabled())
            # Horovod has its own error for a tensor from a process outside of the process set.
            and (self._process_set is None or self.transport.included)
        )

    def _is_large(self, tensor: Tensor) -> bool:
        """Whether a gradient is worth it, or has no other way; the same for its parameter."""
        return is_compressible(tensor.dtype) and (
            tensor.numel() >= self.options.min_numel or not self.transport.takes(tensor)
        )

    def _known_rank(self) -> int:
        """This rank; -1 where Horovod has an error of its own for the tensor: before ``hvd.init()``
        and outside of the process set."""
        try:
            return self.transport.rank
        except (TypeError, ValueError):
            return -1

    @functools.cached_property
    def _operation_names(self) -> OperationNames:
        label = "gqsgd" if self._names is None else f"gqsgd-{self._names.digest():08x}"
        # By process set and label: not all ranks are in every process set, and with names two
        # compressors may be used in another order on another rank.
        key = ("names", self.transport.process_set, label)
        return of_horovod(key, lambda: OperationNames(label))

    def _start(self) -> Pipeline:
        transport, plan = self.transport, None
        if self._names is not None:
            plan = self._names.plan(self.options, self._is_large)
        return Pipeline(
            self.options,
            transport if transport.takes_gpu_tensors else StagedTransport(transport),
            steps=self.steps,
            names=self._operation_names,
            plan=plan,
            slot_filling=SlotFilling(transport.fill_slot, SLOT_BYTES),
            stats=self._stats,
        )
