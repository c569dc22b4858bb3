"""Memory that is used again, step after step.

A fresh buffer of some megabytes costs a page fault for every 4 KiB, about as much time as the whole
kernel that fills it. So buffers are kept, and reused once nothing else refers to them: neither
Horovod nor the ``p.grad`` that a decoded gradient became.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd._native import ops

__all__ = ["BufferPool"]

# A buffer that was not asked for in this many steps is given back: long enough for two or three
# optimizers that take turns, short enough for tensors whose sizes change all the time.
KEEP_STEPS = 8

# How many buffers to look at before taking new memory.
MOST_TRIES = 16


Kind = tuple[tuple[int, ...], torch.dtype, torch.device]
"""Shape, type and device of a contiguous tensor."""


@dataclass(eq=False)
class _Buffer:
    memory: Tensor
    last_step: int


class BufferPool:
    """Contiguous tensors by shape, type and device."""

    def __init__(self) -> None:
        self._buffers: dict[Kind, deque[_Buffer]] = defaultdict(deque)
        self._step = 0

    def __len__(self) -> int:
        """How many buffers are kept."""
        return sum(map(len, self._buffers.values()))

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor with undefined contents, in use until nothing refers to its memory.

        Those whose sizes differ little share memory: which tensors go together in a message may
        change from step to step.
        """
        unit = 1 << max(numel.bit_length() - 5, 0)
        return self.take_each([((-(-numel // unit) * unit,), dtype, device)])[0][:numel]

    def take_each(self, kinds: Sequence[Kind]) -> list[Tensor]:
        """A tensor of each kind, as by ``take``."""
        if any(device.type != "cpu" for _, _, device in kinds):
            # PyTorch caches this memory, and tracks the streams that use it.
            return [
                torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in kinds
            ]
        # Those that have rested longest; one call looks at all of them.
        firsts: dict[_Buffer, int] = {}
        for i, kind in enumerate(kinds):
            buffers = self._buffers[kind]
            if buffers and buffers[0] not in firsts:
                firsts[buffers[0]] = i
                buffers.rotate(-1)
        counts = ops.storage_use_counts([buffer.memory for buffer in firsts])
        taken = {
            i: self._hand_out(buffer)
            for (buffer, i), count in zip(firsts.items(), counts, strict=True)
            if count == 1
        }
        return [taken[i] if i in taken else self._search(kind) for i, kind in enumerate(kinds)]

    def _hand_out(self, buffer: _Buffer) -> Tensor:
        buffer.last_step = self._step
        return buffer.memory.view(buffer.memory.shape)

    def _search(self, kind: Kind) -> Tensor:
        """A free buffer, or a new one. Not all are looked at: a model may have hundreds of tensors
        of one size."""
        buffers = self._buffers[kind]
        tried = list(itertools.islice(buffers, MOST_TRIES))
        counts = ops.storage_use_counts([buffer.memory for buffer in tried])
        first = counts.index(1) if 1 in counts else None
        buffers.rotate(-len(tried) if first is None else -first - 1)
        if first is not None:
            return self._hand_out(tried[first])
        shape, dtype, device = kind
        with torch.inference_mode(False):  # or it could not be written to outside of it later
            buffer = _Buffer(torch.empty(shape, dtype=dtype, device=device), self._step)
        buffers.append(buffer)
        return self._hand_out(buffer)

    def next_step(self) -> None:
        """Marks a step, and forgets buffers that have long not been asked for."""
        self._step += 1
        for key, buffers in list(self._buffers.items()):
            kept = deque(b for b in buffers if self._step - b.last_step <= KEEP_STEPS)
            if kept:
                self._buffers[key] = kept
            else:
                del self._buffers[key]
