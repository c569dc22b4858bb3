"""Several ranks' pipelines in one process, and the means that they should come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import as_numpy, bits_of, from_bits, gradient_like
from torch import Tensor

from hvd_gqsgd import AgreementError
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.operation_slots import SlotFilling
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.transports.base import Done, Handle
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

Named = tuple[str | None, Tensor]


class Elastic:
    """A transport that can be moved to another world, as ``hvd.init()`` moves Horovod's."""

    def __init__(self, world: SimulatedWorld, rank: int) -> None:
        self.end = world.transport(rank)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.end, name)


@dataclass(frozen=True)
class Watched(SimulatedTransport):
    """Notes what was started."""

    started: list[str] = field(default_factory=list)

    def max_async(self, tensor: Tensor, name: str) -> Handle:
        self.started.append(name)
        return super().max_async(tensor, name)

    def sum_async(self, tensor: Tensor, name: str) -> Handle:
        self.started.append(name)
        return super().sum_async(tensor, name)

    def fill_slot(self, name: str) -> Handle:
        self.started.append(name)
        return Done()


class Group:
    """A pipeline for each rank of a simulated world."""

    def __init__(
        self,
        size: int = 2,
        *,
        options: Sequence[dict[str, Any]] = (),
        steps: Sequence[int] = (),
        transport: Callable[[SimulatedWorld, int], Any] = SimulatedTransport,
        plan: BucketPlan | None = None,
        **everywhere: Any,
    ) -> None:
        self.world = SimulatedWorld(size)
        self.transports = [transport(self.world, rank) for rank in range(size)]
        self.ranks = []
        for rank, end in enumerate(self.transports):
            resolved = Options(**everywhere, **(options[rank] if options else {}))
            start = Steps(resolved.bits, steps[rank] if steps else 0)
            filling = SlotFilling(end.fill_slot, 4) if isinstance(end, Watched) else None
            self.ranks.append(Pipeline(resolved, end, plan=plan, steps=start, slot_filling=filling))

    def submit(self, tensors: Sequence[Sequence[Named]]) -> list[list[Ticket]]:
        """Hands in each rank's tensors, rank after rank."""
        return [
            [pipeline.submit(x, name) for name, x in own]
            for pipeline, own in zip(self.ranks, tensors, strict=True)
        ]

    def settle(self) -> None:
        """Lets all ranks come so far that none has to wait for another one."""
        for pipeline in self.ranks:
            pipeline.flush()
        for _ in range(6):  # as many collectives as an exchange has after its first
            for pipeline in self.ranks:
                pipeline.advance()

    def exchange(self, tensors: Sequence[Sequence[Named]]) -> list[list[Tensor]]:
        """Each rank's means, in the order in which it handed in the tensors."""
        tickets = self.submit(tensors)
        self.settle()
        for pipeline, own in zip(self.ranks, tickets, strict=True):
            for ticket in own:
                pipeline.wait(ticket)
        return [
            [pipeline.decode(ticket, 1 / self.world.size) for ticket in own]
            for pipeline, own in zip(self.ranks, tickets, strict=True)
        ]

    def errors(self, tensors: Sequence[Sequence[Named]]) -> list[str]:
        """What each rank is told when it waits for its first tensor."""
        tickets = self.submit(tensors)
        self.settle()
        messages = []
        for pipeline, own in zip(self.ranks, tickets, strict=True):
            with pytest.raises(AgreementError) as caught:
                pipeline.wait(own[0])
            messages.append(str(caught.value))
        return messages


def gradients(
    ranks: int, shapes: Sequence[tuple[str | None, int]], dtype: torch.dtype = torch.float32
) -> list[list[Named]]:
    """Tensors of these names and lengths for each rank."""
    rng = np.random.default_rng(len(shapes))
    return [
        [(name, gradient_like(rng, numel, dtype)) for name, numel in shapes] for _ in range(ranks)
    ]


def expected(
    rows: Sequence[Tensor], label: str | int, *, repeat: int = 0, step: int = 0, bits: int = 8
) -> Tensor:
    """What the reference makes of one tensor of each rank; of one rank, the tensor itself."""
    if len(rows) == 1:
        return rows[0]
    identity = digest((label, repeat, rows[0].numel(), str(rows[0].dtype)))
    mean = reference.mean(
        np.stack([as_numpy(x) for x in rows]), tensor_id=identity, step=step, bits=bits,
        block_size=1024, correlated=True, seed=0,
    )  # fmt: skip
    return from_bits(mean.view(f"i{mean.itemsize}"), rows[0].dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


def check_unnamed(
    means: Sequence[Sequence[Tensor]], tensors: list[list[Named]], **known: Any
) -> None:
    """All ranks have the reference's mean of all tensors, told apart by their order."""
    for i in range(len(tensors[0])):
        right = expected([own[i][1] for own in tensors], i, **known)
        assert all(same(own[i], right) for own in means), i
