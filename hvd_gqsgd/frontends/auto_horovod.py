"""The exchange of gradients under Horovod with ``bits="auto"``: each step takes one setting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.auto.arms import Arm, widest
from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.frontends.compiling import called, opaque, tracer
from hvd_gqsgd.frontends.horovod_exchange import HorovodExchange
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats

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
        self._min_numel = options.min_numel
        self._exchanges: dict[str, HorovodExchange] = {}
        self._handed_out = True
        # Of gradients that pass as those before them; None: there are none.
        self._taken: torch.dtype | None = None
        self._passed: list[int] = []  # elements of those that are not counted yet
        self._counted: list[int] = []  # the last such list, and its sums
        self._sums = (0, 0, 0, 0)
        self._transport: Any = None

    @property
    def described(self) -> str:
        """The setting of the last step; empty before the first one."""
        return self._conductor.arm.name

    @called
    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """See ``GlobalQSGD.compress``. Returns the gradient itself if it goes uncompressed."""
        passes = (  # as one before it: a step may have hundreds, and must not take longer
            tensor.dtype is self._taken
            and not tensor.is_cuda
            and not tensor.requires_grad
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and self._transport.session is self._conductor.session
            and tracer() is None
        )
        if passes:
            numel = tensor.numel()
            if numel < self._min_numel:
                self._passed.append(numel)
                return tensor, None
            if not self._handed_out:
                self._passed.append(numel)
                self._conductor.go_on()
                return tensor, _PASSED
            arm = self._conductor.begin(self._transport)
            self._handed_out = False
            if arm.options is None:
                self._passed.append(numel)
                self._conductor.leave()
                return tensor, _PASSED
        return self._compress(tensor)

    @opaque
    def _compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        self.count_passed()
        conductor, widest = self._conductor, self._of(self._widest)
        if not widest.compresses(tensor):
            conductor.count_small(tensor.numel())
            return widest.bypass(tensor), None
        transport = widest.transport
        new_session = transport.session is not conductor.session
        if new_session:
            conductor.label = widest.label("gqsgd-auto", transport.session)
        if self._handed_out or new_session:
            conductor.begin(transport)
            self._handed_out = False
        conductor.enter(tensor.numel(), on_gpu=tensor.is_cuda)
        arm = conductor.arm
        if arm.options is not None:
            self._taken = None
        result: tuple[Tensor, Any]
        if arm.options is None and transport.takes(tensor):
            result = widest.bypass(tensor, "auto"), _PASSED
            self._taken, self._transport = tensor.dtype, transport
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

    def count_passed(self) -> None:
        """Counts the gradients of a step that passed as those before them."""
        if not self._passed:
            return
        assert self._taken is not None
        if self._passed != self._counted:
            self._counted = self._passed.copy()
            small = [each for each in self._passed if each < self._min_numel]
            self._sums = (sum(self._passed), len(self._passed), sum(small), len(small))
        self._passed.clear()
        numel, tensors, small_numel, small_tensors = self._sums
        stats = self._stats
        stats.tensors += tensors
        stats.tensors_bypassed += tensors
        stats.tensors_small += small_tensors
        stats.tensors_auto += tensors - small_tensors
        stats.bypassed_bytes += numel * self._taken.itemsize
        self._conductor.count_small(small_numel, small_tensors)
        self._conductor.count(numel - small_numel, tensors - small_tensors)

    @called
    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        """See ``GlobalQSGD.decompress``."""
        if ctx is None:
            if self._passed and self._handed_out:  # all are small: no mean is handed out after it
                self.count_passed()
            return tensor
        if ctx is not _PASSED or tracer() is not None:
            return self._decompress(tensor, ctx)
        if not self._handed_out:
            self._handed_out = True
            self.count_passed()
        self._conductor.result()
        return tensor

    @opaque
    def _decompress(self, tensor: Tensor, ctx: _Context) -> Tensor:
        if not self._handed_out:
            self._handed_out = True
            self.count_passed()
        if ctx.exchange is not None:
            tensor = ctx.exchange.decompress(tensor, ctx.inner)
        self._conductor.result()
        return tensor

    def restart(self) -> None:
        """Prepares for the loading of a checkpoint.

        Raises:
            RuntimeError: gradients are in flight.
        """
        for exchange in self._exchanges.values():
            exchange.restart()
            exchange.steps.check_idle()
        self._exchanges.clear()
        self.count_passed()  # here, as they are no load of the first step to come
        self._handed_out, self._taken = True, None

    def _of(self, arm: Arm) -> HorovodExchange:
        if arm.name not in self._exchanges:
            assert arm.options is not None
            self._exchanges[arm.name] = self._make(arm.options, Steps(arm.options.width))
        return self._exchanges[arm.name]
