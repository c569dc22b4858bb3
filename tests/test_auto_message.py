"""The message of ``bits="auto"``: ints of all ranks in a sum of float32."""

from __future__ import annotations

import pytest
import torch

from hvd_gqsgd.auto.message import MOST, pack, unpack


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 100])
def test_all_ints_arrive(size: int) -> None:
    """After the factor of a mean and its inverse, which are rounded."""
    generator = torch.Generator().manual_seed(size)
    words = torch.randint(0, MOST + 1, (size, 9), generator=generator)
    words[:, :3] = torch.tensor([0, MOST, 2**20 - 1])
    messages = [pack(row, rank, size) for rank, row in enumerate(words.tolist())]
    assert messages[0].dtype == torch.float32
    mean = torch.stack(messages).sum(0).mul_(1 / size)
    assert unpack(mean.mul_(size), size).tolist() == words.tolist()


def test_a_rank_that_is_not_there_has_zeros() -> None:
    assert unpack(pack([1, 2], 1, 3), 3).tolist() == [[0, 0], [1, 2], [0, 0]]


def test_larger_ints_are_the_largest() -> None:
    assert unpack(pack([MOST + 1, 2**62], 0, 1), 1).tolist() == [[MOST, MOST]]
