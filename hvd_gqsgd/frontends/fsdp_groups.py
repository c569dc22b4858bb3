"""The exchanges of FSDP among the ranks of a process group: of gradients, and of weights.

Each is waited for, or, over NCCL, enqueued on the current stream.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.codecs import check_device
from hvd_gqsgd.engine.agreement import Ahead, check, refuse
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.frontends.bypass import why_bypassed
from hvd_gqsgd.frontends.fsdp_options import ShardedOptions
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Transport
from hvd_gqsgd.transports.devices import transport_for
from hvd_gqsgd.transports.process_groups import has_nccl, host_group
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

__all__ = ["Allocates", "Group", "Groups", "Shard", "refuse_options"]


class Allocates:
    """The memory of a collective that replaces one of FSDP's."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns memory for an input or an output."""
        return torch.empty(tuple(size), dtype=dtype, device=device)


class Shard(NamedTuple):
    """A parameter's part of an all-gather."""

    name: str
    x: Tensor
    """This rank's shard, flat; not rounded if it is of integers."""
    out: Tensor
    """Memory for those of all ranks, of shape (ranks, elements)."""


class Group:
    """The exchanges among the ranks of one process group, a tensor or a module at a time. All of
    its ranks must make them together.

    Args:
        group: the ranks.
        options: of gradients and of weights.
        stats: counts what is exchanged.
        steps: the state of the training.
        plan: the buckets of weights: one for each module.

    Raises:
        AgreementError: on all ranks, if their options differ.
    """

    def __init__(
        self, group: dist.ProcessGroup, options: ShardedOptions, stats: Stats, steps: Steps,
        plan: BucketPlan | None = None,
    ) -> None:  # fmt: skip
        self._group = weakref.ref(group)
        self.on_host = TorchDistributedTransport(host_group(group))
        check(self.on_host, options, "options")
        self._nccl = has_nccl(group)
        self.size = self.on_host.size
        self.options = options
        self.stats = stats
        self.steps = steps
        self._plan = plan
        self._transports: dict[torch.device, Transport] = {}
        self._pipelines: dict[torch.device, Pipeline] = {}
        self._of_weights: dict[torch.device, Pipeline] = {}
        self._seen: set[object] = set()  # those whose gradients came in this step

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks; None once the process group was destroyed."""
        return self._group()

    def exchanging(self, of: object, x: Tensor) -> AbstractContextManager[None]:
        """A context for all that is done with the gradients of ``of``, bypassed or not."""
        return contextlib.nullcontext()

    def bypasses(self, of: object, x: Tensor) -> bool:
        """Whether the gradients of ``of`` go as they are; then they are counted."""
        self.stats.tensors += 1
        why = why_bypassed(x, self.options.min_numel)
        if why is None:
            return False
        self.stats.bypass(why, x.nbytes, lambda: self.on_host.rank)
        if self.options.weight_bits is not None:  # weights have a new dither in each step
            self._comes(of, x.device)
        return True

    def reduce(self, of: object, x: Tensor, out: Tensor, scale: float) -> None:
        """Writes ``scale`` times the sum over the ranks to ``out``, or this rank's shard of it.

        Args:
            of: the owner of the gradients. A step lasts until the same one comes once more.
        """
        try:
            check_device("GlobalQSGD.fsdp() got gradients", x)
            pipeline = self._comes(of, x.device)
            ticket = pipeline.submit(x, scale=scale, out=out)
        except Exception:
            self.refuse()
            raise
        pipeline.wait(ticket)
        pipeline.decode(ticket, scale)

    def gather(self, shards: Sequence[Shard], step: int) -> None:
        """Gathers the weights of a module as codes; ``step`` chooses their dither."""
        try:
            check_device("GlobalQSGD.fsdp() got weights", shards[0].x)
            pipeline = self._weight_pipeline(shards[0].x.device)
            before = pipeline.stats.compressed_bytes_on_wire
            pipeline.begin_step(step)
            tickets = [pipeline.submit(x, name, scale=1.0, out=out) for name, x, out in shards]
        except Exception:
            self.refuse()
            raise
        for ticket in tickets:
            pipeline.wait(ticket)
            pipeline.decode(ticket, 1.0)
        self.stats.weight_bytes_before += sum(shard.out.nbytes for shard in shards)
        self.stats.weight_bytes_on_wire += pipeline.stats.compressed_bytes_on_wire - before

    def end_step(self) -> None:
        """The gradients that come next begin a step, whoever owns them."""
        self._seen.clear()

    def refuse(self) -> None:
        """Tells the other ranks, which may be waiting, that this one does not take part."""
        refuse(self.on_host, "header")

    def _comes(self, of: object, device: torch.device) -> Pipeline:
        """The pipeline of gradients that come, in the same step or in a new one."""
        pipeline = self._pipeline(device)
        if not self._seen or of in self._seen:
            self._seen.clear()
            for each in self._pipelines.values():
                each.begin_step()
        self._seen.add(of)
        return pipeline

    def _pipeline(self, device: torch.device) -> Pipeline:
        if device not in self._pipelines:
            self._pipelines[device] = Pipeline(
                self.options, self._transport(device), protocol=Ahead, steps=self.steps,
                stats=self.stats,
            )  # fmt: skip
            self._seen.clear()
        return self._pipelines[device]

    def _weight_pipeline(self, device: torch.device) -> Pipeline:
        if device not in self._of_weights:
            self._of_weights[device] = Pipeline(
                self.options.of_weights, self._transport(device), protocol=Ahead, plan=self._plan
            )
        return self._of_weights[device]

    def _transport(self, device: torch.device) -> Transport:
        """One for gradients and weights, as FSDP exchanges both in one order on all ranks."""
        if device not in self._transports:
            self._transports[device] = transport_for(device, self.on_host, self._nccl)
        return self._transports[device]


class Groups:
    """The exchanges of a model, whose modules may be on several meshes.

    Args:
        make: those of one process group.
    """

    def __init__(self, make: Callable[[dist.ProcessGroup], Group]) -> None:
        self._make = make
        self._known: weakref.WeakKeyDictionary[dist.ProcessGroup, Group]
        self._known = weakref.WeakKeyDictionary()

    def __contains__(self, group: dist.ProcessGroup) -> bool:
        return group in self._known

    def of(self, group: dist.ProcessGroup) -> Group:
        """That of a group; made when it is first asked for, by all of its ranks."""
        if group not in self._known:
            self._known[group] = self._make(group)
        return self._known[group]


def refuse_options(groups: Sequence[dist.ProcessGroup]) -> None:
    """Tells the other ranks of some groups, which compare options, of an error of this one."""
    for group in groups:
        refuse(TorchDistributedTransport(host_group(group)), "options")
