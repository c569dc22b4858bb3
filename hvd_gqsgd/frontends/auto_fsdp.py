"""FSDP's gradients with ``bits="auto"``: each step takes one setting."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.frontends.bypass import why_bypassed
from hvd_gqsgd.frontends.fsdp_groups import Group
from hvd_gqsgd.frontends.fsdp_options import ShardedOptions
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.process_groups import host_group
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

__all__ = ["AutoGroup"]


class AutoGroup(Group):
    """The exchanges of all settings among the ranks of one process group.

    Args:
        group, options, stats, plan: as for ``Group``.
        conductor: chooses the setting.
        together: the ranks that take one setting; None: those of ``group``.
    """

    def __init__(
        self, group: dist.ProcessGroup, options: ShardedOptions, stats: Stats,
        conductor: Conductor, plan: BucketPlan | None = None,
        together: dist.ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__(group, options, stats, Steps(8), plan)  # each setting has steps of its own
        self._conductor = conductor
        self._together = self.on_host
        if together is not None:
            self._together = TorchDistributedTransport(host_group(together))
        # Of this step; another model may begin the next one before this step ends.
        self._arm, self._step = conductor.arm, 0
        self._with: dict[str, Group] = {}
        self._of_step: set[object] = set()

    @contextlib.contextmanager
    def exchanging(self, of: object, x: Tensor) -> Iterator[None]:
        """See ``Group.exchanging``. Measures the time."""
        conductor = self._conductor
        if not self._of_step or of in self._of_step:
            self._of_step.clear()
            self._arm = conductor.begin(self._together, self.size)
            self._step = conductor.current
            for exchange in self._with.values():
                exchange.end_step()
        self._of_step.add(of)
        if why_bypassed(x, self.options.min_numel) is not None:
            conductor.count_small(x.numel())
            yield
            return
        conductor.enter(x.numel(), on_gpu=x.is_cuda)
        yield
        conductor.leave()
        conductor.result()

    def bypasses(self, of: object, x: Tensor) -> bool:
        """See ``Group.bypasses``."""
        if self._arm.options is not None:
            return self._of(self._arm.options).bypasses(of, x)
        self.stats.tensors += 1
        why = why_bypassed(x, self.options.min_numel) or "auto"
        self.stats.bypass(why, x.nbytes, lambda: self.on_host.rank)
        return True

    def reduce(self, of: object, x: Tensor, out: Tensor, scale: float) -> None:
        """See ``Group.reduce``."""
        assert self._arm.options is not None
        self._of(self._arm.options).reduce(of, x, out, scale)

    def _of(self, options: Options) -> Group:
        """The exchange of the setting of this step."""
        name = self._arm.name
        if name not in self._with:
            group = self.group
            assert group is not None
            of_arm = dataclasses.replace(
                self.options, bits=options.bits, block_size=options.block_size, error=None,
                plan=None,
            )  # fmt: skip
            self._with[name] = Group(group, of_arm, self.stats, Steps(options.width))
        exchange = self._with[name]
        exchange.steps.resume_at(self._step)
        return exchange
