"""The bits of results are pinned: every run, thread count, instruction set and machine gives them.

A change of these digests is a change of what ranks with another build of hvd_gqsgd would get: it
goes with a new ``WIRE_VERSION``. Buckets of any size are in ``test_fuzz.py``, transports and
training in ``ranks/test_determinism.py``, and CUDA in ``test_cuda_kernels.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DTYPES, bits_of, from_bits, instruction_set
from torch import Tensor

from hvd_gqsgd import simulate
from hvd_gqsgd._native import ops

OPERATORS: list[tuple[dict[str, Any], str]] = [
    ({}, "ee7c4d8fd2404124"),
    ({"bits": 5, "correlated": False, "seed": -7}, "d6d2fb28ef6fe586"),
    ({"bits": 16, "block_size": None, "exchange": "allreduce"}, "94edf98afc2b3b24"),
    ({"bits": 11, "block_size": 100, "norm": "l2"}, "9b98b4bfe4da05c0"),
    ({"bits": 4, "exchange": "two_phase"}, "e05e1b665f107a10"),
    ({"dither": "exponential", "block_size": 1500}, "de5a754d9b97b794"),
    ({"dither": "exponential", "bits": 4, "norm": "l2"}, "f6774be18a5abfe5"),
]


def gradients(dtype: torch.dtype) -> Tensor:
    """Finite numbers of all magnitudes, by integer arithmetic alone; enough for two threads."""
    count = torch.arange(3 * 66_001, dtype=torch.int64) + 1
    bits = count * 0x1E3779B97F4A7C15 >> 64 - 8 * dtype.itemsize
    x = from_bits(bits, dtype)
    return torch.where(x.isfinite(), x, torch.ones((), dtype=dtype)).view(3, -1)


def digest(options: dict[str, Any], step: int = 3) -> str:
    """Of the means in all types."""
    hashed = hashlib.sha256()
    for dtype in DTYPES:
        mean = simulate(gradients(dtype), step=step, **options)
        hashed.update(bits_of(mean).numpy().tobytes())
    return hashed.hexdigest()[:16]


@pytest.mark.parametrize(("options", "pinned"), OPERATORS, ids=lambda value: str(value))
def test_bits_are_pinned(
    options: dict[str, Any], pinned: str, thread_count: Callable[[int], None]
) -> None:
    """With threads as far as there is work for them (``test_kernels.py`` has more), and with the
    generic kernels and all others that this processor runs."""
    sets = ops.instruction_sets()
    for isa, threads in [*((isa, 1) for isa in sets), (sets[0], 2), (sets[-1], 4)]:
        thread_count(threads)
        with instruction_set(isa):
            assert digest(options) == pinned, (isa, threads)
    assert digest(options, step=4) != pinned
    assert digest({**options, "seed": 1}) != pinned
