"""The messages of ranks about their steps with ``bits="auto"``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.auto.chooser import MOST
from hvd_gqsgd.auto.seen import Seen

__all__ = ["Heard", "message_of", "states_message"]

STATE_WORDS = 128
"""Numbers of a rank in the message of states; the same in every build."""


class Heard(NamedTuple):
    """The maxima over the ranks."""

    all_here: bool
    """Whether no rank has left by ``hvd.join()``."""
    step: int
    """The number of the step in which it was sent, on the rank that is furthest."""
    arm: int
    """The arm of the step before."""
    alike: bool
    """Whether all ranks have this number and this arm."""
    load: list[int]
    """Elements of gradients that arms may compress, those of others, and the numbers of both."""
    steps: list[Seen]
    """The times of the steps in the message."""

    @classmethod
    def of(cls, message: Tensor) -> Heard:
        """Reads the reduced message."""
        here, step, least_step, arm, least_arm, *words = message.tolist()
        steps = [Seen(*words[first : first + 3]) for first in range(4, len(words), 3)]
        return cls(
            here < 0, step, arm, (step, arm) == (-least_step, -least_arm), words[:4],
            [seen for seen in steps if seen.busy],
        )  # fmt: skip


def message_of(
    step: int, arm: int, load: Sequence[int], steps: Sequence[tuple[int, int, int]]
) -> Tensor:
    """The message of a rank, an int64 tensor on the CPU; see ``Heard``. It has the times of
    at most ``MOST`` steps."""
    told = [*itertools.chain(*steps[:MOST])]
    # Negatives give the smallest ones. Of a rank that has left, Horovod takes zeros.
    words = [-1, step, -step, arm, -arm, *load, *told, *[0] * (3 * MOST - len(told))]
    return torch.tensor(words, dtype=torch.int64, device="cpu")


def states_message(rank: int, size: int, words: Sequence[int]) -> Tensor:
    """The message of a rank that tells its state, an int64 tensor on the CPU. The sum over the
    ranks has a row for each of them."""
    before, after = STATE_WORDS * rank, STATE_WORDS * (size - rank) - len(words)
    row = [*[0] * before, *words, *[0] * after]
    return torch.tensor(row, dtype=torch.int64, device="cpu")
