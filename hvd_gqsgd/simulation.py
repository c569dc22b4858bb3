"""Simulates all ranks of an exchange in one process, to study its error for any world size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd.checks import check_step
from hvd_gqsgd.codecs import check_compressible, check_unmasked
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.front_end import FrontEnd
from hvd_gqsgd.nodes import nodes_of_sizes
from hvd_gqsgd.option_types import OptionKeywords
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.simulated import SimulatedWorld

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SimulatedRanks", "simulate"]

FRONT_END = FrontEnd("simulate()", own=("step", "nodes"), exchanges=("one_phase",))


@overload
def simulate(
    gradients: Tensor, *, step: int = 0, nodes: Sequence[int] | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def simulate(
    gradients: np.ndarray[Any, Any], *, step: int = 0, nodes: Sequence[int] | None = None,
    **options: Unpack[OptionKeywords],
) -> np.ndarray[Any, Any]: ...  # fmt: skip
@FRONT_END.documented
def simulate(
    gradients: Tensor | np.ndarray[Any, Any], *, step: int = 0, nodes: Sequence[int] | None = None,
    **options: Unpack[OptionKeywords],
) -> Tensor | np.ndarray[Any, Any]:  # fmt: skip
    """Returns the mean that ranks would decode, with one row of ``gradients`` per rank.

    All ranks run in this process, with the pipeline and the codec of the real exchange. The result
    has the bits that Horovod ranks get for the first unnamed tensor of step ``step``. With
    ``exchange="one_phase"``, the result is the concatenation of the shards of all ranks, as under
    FSDP.

    Args:
        gradients: a tensor or an array of shape (world size, elements); float16, bfloat16, float32
            or float64.
        step: number of the step, starting at 0. The dither depends on the step.
        nodes: number of ranks of each node, in order of rank; None for one node.
        options: see :class:`hvd_gqsgd.options.Options`. The options of a training can be passed
            unchanged: ``min_numel`` and ``bucket_mb`` are checked, and do not affect the mean of a
            tensor.

    Returns:
        The decoded mean, of shape (elements,) and the dtype of ``gradients``; a NumPy array if
        ``gradients`` is a NumPy array.

    Raises:
        TypeError: ``gradients`` or an option has the wrong type, or an option is unknown.
        NotImplementedError: ``gradients`` is on a device without kernels in this build.
        ValueError: ``gradients`` has the wrong shape, an option or ``step`` is out of range, or the
            lanes are too narrow for the world size.

    Example::

        >>> rows = torch.randn(8, 100_000)
        >>> error = simulate(rows, bits=4) - rows.mean(0)
    """
    if isinstance(gradients, np.ndarray):
        check_unmasked("gradients", gradients)
        array = torch.from_numpy(np.array(gradients))
        return simulate(array, step=step, nodes=nodes, **options).numpy()
    if not isinstance(gradients, Tensor):
        raise TypeError(f"gradients must be a tensor or a NumPy array, got {type(gradients)}")
    check_compressible("gradients", gradients)
    if gradients.dim() != 2 or gradients.shape[0] < 1:
        raise ValueError(
            f"gradients must be of shape (ranks, elements), got {tuple(gradients.shape)}"
        )
    check_step(step)

    resolved = FRONT_END.options(options)
    rows, (size, numel) = gradients.detach().contiguous(), gradients.shape
    ranks = SimulatedRanks(size, resolved, step, nodes)
    if resolved.exchange == "one_phase":
        rows = torch.nn.functional.pad(rows, (0, -numel % size))
        mean = rows.new_empty(rows.shape[1])
        ranks.means([[("", row)] for row in rows], list(mean.view(size, rows.shape[1] // size)))
        return mean[:numel]
    (mean,) = ranks.means([[("", row)] for row in rows])
    return mean


class SimulatedRanks:
    """All ranks of a training in one process, step by step.

    Args:
        size: number of ranks.
        options: the options of all ranks.
        step: number of the first step.
        nodes: number of ranks of each node, in order of rank; None for one node.

    Raises:
        ValueError: ``nodes`` do not add up to ``size``.
    """

    def __init__(
        self, size: int, options: Options, step: int = 0, nodes: Sequence[int] | None = None
    ) -> None:
        self.stats = Stats()
        """The bytes on the wire of each rank."""
        world = SimulatedWorld(size, nodes_of_sizes(nodes, size) if nodes else None)
        self._ranks = [
            Pipeline(
                options, world.transport(rank),
                steps=Steps(options.width, step, options.error_feedback),
                stats=None if rank else self.stats,
            )
            for rank in range(size)
        ]  # fmt: skip

    def means(
        self,
        gradients: Sequence[Sequence[tuple[str, Tensor]]],
        shards: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Returns the means that rank 0 decodes in a step; in one phase, shards differ by rank.

        Args:
            gradients: names and contiguous gradients of each rank. Their order determines buckets,
                and identifies gradients without a name.
            shards: memory for each rank's part of the only gradient, for ``exchange="one_phase"``.

        Raises:
            ValueError: the lanes are too narrow for the number of ranks.
        """
        outs: Sequence[Tensor | None] = shards or [None] * len(self._ranks)
        tickets = [
            [rank.submit(x, name or None, out=out) for name, x in own]
            for rank, own, out in zip(self._ranks, gradients, outs, strict=True)
        ]
        for rank in self._ranks:
            rank.flush()
        arrived = [False]
        while not all(arrived):  # poll() raises what went wrong
            arrived = [
                rank.poll(ticket) is not None
                for rank, own in zip(self._ranks, tickets, strict=True)
                for ticket in own
            ]
        first, *others = self._ranks
        share = 1 / len(self._ranks)
        if first.steps.learns or shards or first.options.error_feedback is not None:
            for rank, own in zip(others, tickets[1:], strict=True):
                for ticket in own:
                    rank.decode(ticket, share)
        return [first.decode(ticket, share) for ticket in tickets[0]]

    def state_dicts(self) -> list[dict[str, Any]]:
        """The state of each rank: what the ``state_dict()`` of its compressor has."""
        return [rank.steps.state_dict() for rank in self._ranks]

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes over a state for each rank."""
        for rank, state in zip(self._ranks, states, strict=True):
            rank.steps.load_state_dict(state)
