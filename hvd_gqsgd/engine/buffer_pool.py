"""Memory that is used again, step after step.

A fresh buffer of some megabytes costs a page fault for every 4 KiB, about as much time as the whole
kernel that fills it. So buffers are kept, and handed out again once nobody else looks at them: not
Horovod, and not the ``p.grad`` that a decoded gradient became.
"""

from __future__ import annotations

from collections import defaultdict, deque
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


@dataclass
class _Buffer:
    memory: Tensor
    last_step: int


class BufferPool:
    """Flat tensors by size, type and device."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype, torch.device], deque[_Buffer]] = defaultdict(
            deque
        )
        self._step = 0

    def __len__(self) -> int:
        """How many buffers are kept."""
        return sum(map(len, self._buffers.values()))

    def take(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor with undefined contents, in use until nothing refers to its memory."""
        if device.type != "cpu":  # PyTorch keeps this memory, and knows the streams that use it
            return torch.empty(numel, dtype=dtype, device=device)
        buffers = self._buffers[numel, dtype, device]
        # From the one that has rested longest on, and not through all of them: a model may have
        # hundreds of tensors of one size.
        for _ in range(min(len(buffers), MOST_TRIES)):
            buffer = buffers.popleft()
            buffers.append(buffer)
            if ops.storage_use_count(buffer.memory) == 1:
                break
        else:
            with torch.inference_mode(False):  # or it could not be written to outside of it later
                buffer = _Buffer(torch.empty(numel, dtype=dtype, device=device), self._step)
            buffers.append(buffer)
        buffer.last_step = self._step
        return buffer.memory.view(-1)

    def next_step(self) -> None:
        """Marks a step, and forgets buffers that have long not been asked for."""
        self._step += 1
        for key, buffers in list(self._buffers.items()):
            kept = deque(b for b in buffers if self._step - b.last_step <= KEEP_STEPS)
            if kept:
                self._buffers[key] = kept
            else:
                del self._buffers[key]
