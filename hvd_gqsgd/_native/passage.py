"""Gradients that go uncompressed, on their way through a compressor's two methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd._native import ops

__all__ = ["Counts", "Passage", "Passed"]


class Counts(NamedTuple):
    """Gradients that passed: elements, and tensors."""

    numel: int = 0
    tensors: int = 0
    small_numel: int = 0
    small_tensors: int = 0


class Passed(NamedTuple):
    """What has passed since the last look."""

    counts: Counts
    of_step: Counts
    """Those since the last step began that ``steps`` has, if it has any."""
    steps: tuple[tuple[float, float, float], ...]
    """When a step began, its last gradient was handed in, and its last mean was handed out, in
    seconds as ``time.perf_counter``; 0: that was not yet, or before. The first one began before."""


class Passage:
    """The two methods of a compressor, with a short way for gradients as those before them.

    A step may have hundreds of gradients, and each call of a Python function takes microseconds.
    The short way is that of ``native/torch/passage.cc``. Without the native library, all gradients
    take the long way, that of this class.

    Args:
        begin: begins a step at its first gradient; returns whether its gradients pass.
        compress: the long way, of a tensor.
        decompress: the long way, of a tensor and a context.
        context: the context of gradients that pass, but for small ones, which have None.
        min_numel: elements that other gradients have at least.
        timed: whether clocks may be read.
    """

    handed_out: bool = True
    """Whether a mean was handed out since the first gradient of the step."""

    def __init__(
        self,
        begin: Callable[[], bool],
        compress: Callable[[Tensor], tuple[Tensor, Any]],
        decompress: Callable[[Tensor, Any], Tensor],
        context: object,
        min_numel: int,
        timed: bool,
    ) -> None:
        self.compress = compress
        self.decompress = decompress

    def open(
        self, dtype: torch.dtype, free: int, variables: tuple[tuple[dict[str, Any], str], ...]
    ) -> None:
        """Lets contiguous tensors on the CPU of this dtype pass, and so many steps begin without
        ``begin``, as long as variables keep their values.

        Args:
            dtype: the dtype.
            free: the number of steps.
            variables: names, each with the ``__dict__`` that has it.
        """

    def close(self) -> None:
        """Lets no more tensors pass."""

    def take(self) -> Passed:
        """Returns what has passed since the last call."""
        return Passed(Counts(), Counts(), ((0.0, 0.0, 0.0),))


if ops.COMPILED:
    from hvd_gqsgd._native import _C  # type: ignore[attr-defined]

    Passage = _C.Passage  # type: ignore[misc]
