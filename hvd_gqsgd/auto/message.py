"""Non-negative ints of all ranks, each rank's in a place of its own, as a sum of float32.

Horovod exchanges float32 of the host together with gradients, in one operation: a message of
integers would take an operation more in each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["MOST", "pack", "unpack"]

_DIGIT = 20  # bits of a number in float32, which the factor of a mean and its inverse round
MOST = 2 ** (2 * _DIGIT) - 1
"""The largest int of a message; others are sent as this one."""

_LOW = 2**_DIGIT - 1


def pack(words: Sequence[int], rank: int, size: int) -> Tensor:
    """A message with the words of a rank, and zeros for all others: float32, flat."""
    row = np.minimum(np.array(words, np.int64), MOST)
    table = np.zeros((size, 2, len(words)), np.float32)
    table[rank, 0] = row & _LOW
    table[rank, 1] = row >> _DIGIT
    return torch.from_numpy(table).view(-1)


def unpack(total: Tensor, size: int) -> npt.NDArray[Any]:
    """The words of all ranks in the sum of their messages, int64 of shape (size, words); zeros for
    a rank that was not there."""
    digits = np.rint(total.numpy()).astype(np.int64).reshape(size, 2, -1)
    words: npt.NDArray[Any] = digits[:, 0] + (digits[:, 1] << _DIGIT)
    return words
