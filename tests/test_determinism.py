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

from hvd_gqsgd import BlockBits, simulate
from hvd_gqsgd._native import ops

OPERATORS: list[tuple[dict[str, Any], str]] = [
    ({}, "969ca541f514b006"),
    ({"bits": 5, "correlated": False, "seed": -7}, "745e958495c0ea49"),
    ({"bits": 16, "block_size": None, "exchange": "allreduce"}, "046413de3c50ce04"),
    ({"bits": 11, "block_size": 100, "norm": "l2"}, "ccaacfffa90a6e9a"),
    ({"bits": 4, "exchange": "two_phase"}, "8da663d6bdaaf7b1"),
    ({"dither": "exponential", "block_size": 1500}, "8b2685215e3fadc9"),
    ({"dither": "exponential", "bits": 4, "norm": "l2"}, "539b96ba506cd642"),
    ({"bits": BlockBits(4.5)}, "7e2e03ef48d1ff63"),
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
