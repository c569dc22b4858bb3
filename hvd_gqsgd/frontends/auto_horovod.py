"""The exchange of gradients under Horovod with ``bits="auto"``: each step takes one setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd._native.passage import Passage
from hvd_gqsgd.auto.arms import Arm, widest
from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.horovod_exchange import HorovodExchange
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats

if TYPE_CHECKING:
    from hvd_gqsgd.transports.horovod import HorovodTransport

__all__ = ["AutoCompressor"]


class _Context(NamedTuple):
    """The context of a tensor; ``inner`` is that of its exchange, None if it is uncompressed."""

    exchange: HorovodExchange | None
    inner: Any


_PASSED = _Context(None, None)


class AutoCompressor:
    """The exchanges of all settings, of which each step takes one.

    A step begins with the first gradient after the last mean was handed out.

    Args:
        conductor: chooses the setting.
        options: those of the user.
        stats: counts gradients that go uncompressed.
        make: an exchange with other options.
    """

    def __init__(
        self,
        conductor: Conductor,
        options: Options,
        stats: Stats,
        make: Callable[[Options, Steps], HorovodExchange],
    ) -> None:
        self._conductor = conductor
        self._stats = stats
        self._make = make
        self._widest = widest(options)
        self._exchanges: dict[str, HorovodExchange] = {}
        self._is_open = False  # whether gradients may pass
        self._dtype: torch.dtype | None = None  # theirs
        # A step without compression must not take longer than plain Horovod's.
        self._passage = Passage(
            self._begin, self._compress, self._decompress, _PASSED, options.min_numel,
            conductor.timed,
        )  # fmt: skip
        self.compress = self._passage.compress
        """See ``GlobalQSGD.compress``. Returns the gradient itself if it goes uncompressed."""
        self.decompress = self._passage.decompress
        """See ``GlobalQSGD.decompress``."""

    @property
    def described(self) -> str:
        """The setting of the last step; empty before the first one."""
        return self._conductor.arm.name

    @opaque
    def _begin(self) -> bool:
        """Begins a step; returns whether its gradients go uncompressed."""
        transport = self._of(self._widest).transport
        passes = self._conductor.begin(transport).options is None
        self._passage.handed_out = False
        if passes:
            self._open(transport)
        self._conductor.leave()
        return passes

    def _open(self, transport: HorovodTransport) -> None:
        """Lets the next gradients pass."""
        conductor = self._conductor
        if conductor.catch_up != self.count_passed:  # that of another front end
            conductor.catch_up(True)
            conductor.catch_up = self.count_passed
        assert self._dtype is not None
        self._is_open = True
        self._passage.open(self._dtype, conductor.free, transport.session_variables)

    @opaque
    def _compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        self.count_passed()  # also for the number of this step
        conductor, widest = self._conductor, self._of(self._widest)
        if not widest.compresses(tensor):
            conductor.count_small(tensor.numel())
            return widest.bypass(tensor), None
        transport = widest.transport
        new_session = transport.session is not conductor.session
        if new_session:
            conductor.label = widest.label("gqsgd-auto", transport.session)
        if self._passage.handed_out or new_session:
            conductor.begin(transport)
            self._passage.handed_out = False
        conductor.enter(tensor.numel(), on_gpu=tensor.is_cuda)
        arm = conductor.arm
        result: tuple[Tensor, Any]
        if arm.options is None and transport.takes(tensor):
            result = widest.bypass(tensor, "auto"), _PASSED
            self._dtype = tensor.dtype
            self._open(transport)
        else:  # Horovod takes no bfloat16, for one
            exchange = widest if arm.options is None else self._of(arm)
            exchange.steps.resume_at(conductor.current)
            steps = self._stats.steps
            probe, inner = exchange.start(tensor)
            if arm.options is None:  # the conductor has counted the step
                self._stats.steps = steps
            result = probe, _Context(exchange, inner)
        conductor.leave()
        return result

    @opaque
    def _decompress(self, tensor: Tensor, ctx: _Context | None) -> Tensor:
        if ctx is None:
            return tensor
        self._passage.handed_out = True
        if ctx.exchange is not None:
            tensor = ctx.exchange.decompress(tensor, ctx.inner)
        self._conductor.result()
        return tensor

    def count_passed(self, last: bool = False) -> None:
        """Counts the gradients and the steps that passed as those before them.

        Args:
            last: whether no more of them may pass.
        """
        if not self._is_open:
            return
        if last:
            self._passage.close()
            self._is_open = False
        counts, of_step, steps = self._passage.take()
        (_, *times), *more = steps
        self._conductor.passed(*times)
        for began, *times in more:
            self._conductor.go_on(began)
            self._conductor.passed(*times)
        numel, tensors, small_numel, small_tensors = counts
        if tensors or small_tensors:
            assert self._dtype is not None
            self._stats.bypassed_bytes += self._dtype.itemsize * (numel + small_numel)
            self._stats.tensors += tensors + small_tensors
            self._stats.tensors_bypassed += tensors + small_tensors
            self._stats.tensors_small += small_tensors
            self._stats.tensors_auto += tensors
        numel, tensors, small_numel, small_tensors = of_step
        self._conductor.count(numel, tensors)
        self._conductor.count_small(small_numel, small_tensors)

    def restart(self) -> None:
        """Prepares for the loading of a checkpoint.

        Raises:
            RuntimeError: gradients are in flight.
        """
        for exchange in self._exchanges.values():
            exchange.restart()
            exchange.steps.check_idle()
        self._exchanges.clear()
        self.count_passed(last=True)  # here, as they are no load of the first step to come
        self._passage.handed_out = True

    def _of(self, arm: Arm) -> HorovodExchange:
        if arm.name not in self._exchanges:
            assert arm.options is not None
            self._exchanges[arm.name] = self._make(arm.options, Steps(arm.options.width))
        return self._exchanges[arm.name]
