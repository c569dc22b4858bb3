"""DDP's buckets with ``bits="auto"``: each step takes one setting."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from hvd_gqsgd.auto.arms import Arm
from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.front_end import FrontEnd
from hvd_gqsgd.frontends.bypass import nbytes_of, why_bypassed
from hvd_gqsgd.frontends.ddp_exchange import BucketExchange, GroupExchange, average_plainly
from hvd_gqsgd.options import OF_AUTO
from hvd_gqsgd.stats import Stats

__all__ = ["AutoBucketExchange"]


class AutoBucketExchange(GroupExchange):
    """The exchanges of all settings, of which each step takes one.

    The connections of a setting are opened when a step first takes it, and left to the next one.

    Args:
        group, front_end, given: as for ``GroupExchange``.
        stats: counts messages, tensors and steps.
        conductor: chooses the setting; None: a new one.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        front_end: FrontEnd,
        given: Mapping[str, Any],
        stats: Stats,
        conductor: Conductor | None,
    ) -> None:
        super().__init__(group, front_end, given)
        self._given = dict(given)
        self._front_end = front_end
        self._stats = stats
        self.steps = conductor or Conductor(self.options, stats, math.inf)
        self._exchange: BucketExchange | None = None
        self._with = ""  # its setting
        # Of this step; another model may begin the next one before this step ends.
        self._arm, self._step = self.steps.arm, 0

    @property
    def described(self) -> str:
        """The setting of the last step."""
        return self._arm.name

    def held(self) -> AbstractContextManager[None]:
        """Nothing goes on in the meantime."""
        return self._exchange.held() if self._exchange is not None else nullcontext()

    def average(self, buffer: Tensor, begin: bool) -> Future[Tensor]:
        """See ``BucketExchange.average``."""
        conductor = self.steps
        if begin:
            self._arm = conductor.begin(self._host)
            self._step = conductor.current
        why = why_bypassed(buffer, self.options.min_numel)
        if why is None:
            conductor.enter(buffer.numel(), on_gpu=buffer.is_cuda)
        else:
            conductor.count_small(buffer.numel())
        if self._arm.options is None:
            self._stats.bypass(why or "auto", nbytes_of(buffer), lambda: self.rank)
            future = average_plainly(buffer, self.group)
        else:
            future = self._of(self._arm).average(buffer, begin)
        if why is None:
            future.add_done_callback(lambda _: conductor.result())
            conductor.leave()
        return future

    def close(self) -> None:
        """See ``BucketExchange.close``."""
        if self._exchange is not None:
            self._exchange.close()
        self._exchange, self._with = None, ""

    def _of(self, arm: Arm) -> BucketExchange:
        """The exchange of the setting of this step."""
        options = arm.options
        assert options is not None
        if self._exchange is None or arm.name != self._with:
            self.close()
            given = {name: value for name, value in self._given.items() if name not in OF_AUTO}
            self._exchange = BucketExchange(
                self.group, self._front_end, given | {"bits": options.bits}, self._stats,
                Steps(options.width),
            )  # fmt: skip
            self._with = arm.name
        self._exchange.steps.resume_at(self._step)
        return self._exchange
