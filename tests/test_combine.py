"""Sums of exponential codes that are codes again: the bits of the reference, right on average."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import instruction_set, threshold

from hvd_gqsgd._native import ops
from hvd_gqsgd.reference.combine import exponential_sum
from hvd_gqsgd.reference.linear import hash_bits
from hvd_gqsgd.reference.two_phase import exponential_levels

WIDTHS = [4, 8]


def lanes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes in bytes, the first one lowest."""
    places = codes.reshape(-1, 8 // bits).astype(np.int64)
    return (places << (bits * np.arange(8 // bits))).sum(1).astype(np.uint8)


def pairs(bits: int, copies: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of codes that there are, the two zeros included."""
    a, b = np.divmod(np.arange(4**bits), 2**bits)
    return np.tile(a, copies), np.tile(b, copies)


@pytest.mark.parametrize("bits", WIDTHS)
def test_same_bits_as_reference(bits: int) -> None:
    a, b = pairs(bits, copies=2 if bits == 8 else 99)
    key = 0xFEDCBA9876543210
    xi = hash_bits(np.full(a.size, key, np.uint64), np.arange(a.size))
    expected = lanes(exponential_sum(a, b, bits, xi), bits)
    for name in ops.instruction_sets():
        with instruction_set(name):
            to = torch.from_numpy(lanes(b, bits))
            ops.combine(torch.from_numpy(lanes(a, bits)), to, bits, key - 2**64)
            assert np.array_equal(to.numpy(), expected), name


@pytest.mark.parametrize("bits", WIDTHS)
def test_right_on_average(bits: int) -> None:
    """Over 2^16 dithers, evenly spread, so there is no false alarm. Chances are powers of two, so
    that nothing changes between two of them."""
    top = 2 ** (bits - 1) - 1
    a, b = pairs(bits)
    apart = abs((a & top) - (b & top))
    fits = (np.maximum(a & top, b & top) < top) & ((apart <= 16) | ((a & top) * (b & top) == 0))
    a, b = a[fits], b[fits]
    total = np.zeros(a.size)
    for first, count in [(0, 1), *((2**k, 2**k) for k in range(16))]:
        codes = exponential_sum(a, b, bits, np.uint32(first << 16))
        total += count * exponential_levels(codes, bits).astype(np.float64)
    expected = exponential_levels(a, bits).astype(float) + exponential_levels(b, bits)
    assert np.array_equal(total / 2**16, expected)


@pytest.mark.parametrize("bits", WIDTHS)
def test_native_sums_are_right_on_average(bits: int) -> None:
    """Each of the 20 comparisons would reject right sums once in 10^9 cases."""
    top, count = 2 ** (bits - 1) - 1, 2**15
    for apart, sign in itertools.product(range(5), (0, top + 1)):
        a, b = np.full(count, top - 1), np.full(count, top - 1 - apart | sign)
        to = torch.from_numpy(lanes(b, bits))
        ops.combine(torch.from_numpy(lanes(a, bits)), to, bits, 7 + apart)
        got = to.numpy()[:, None] >> np.arange(0, 8, bits) & 2**bits - 1
        sums = exponential_levels(got.ravel().astype(np.int64), bits).astype(float)
        expected = sum(exponential_levels(x[:1], bits).astype(float)[0] for x in (a, b))
        assert abs(sums.mean() - expected) <= threshold(1e-9) * sums.std() / np.sqrt(count)


@pytest.mark.parametrize("bits", WIDTHS)
def test_never_more_than_twice_the_larger(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    a, b = pairs(bits)
    larger = np.maximum(a & top, b & top)
    for xi in (0, 1, 2**31, 2**32 - 1):
        total = exponential_sum(a, b, bits, np.uint32(xi))
        assert ((total & top) <= np.minimum(larger + 1, top)).all()


def test_zeros_do_not_count() -> None:
    codes = np.arange(256)
    for zero in (0, 128):
        total = exponential_sum(codes, np.full(256, zero), 8, np.uint32(5))
        assert np.array_equal(total, np.where(codes & 127, codes, 0))


def test_what_cannot_be_summed_is_refused() -> None:
    byte = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="bits must be 4 or 8 for exponential codes, got 5"):
        ops.combine(byte, byte.clone(), 5, 0)
    with pytest.raises(ValueError, match="to must have 4 elements, got 3"):
        ops.combine(byte, byte[:3].clone(), 8, 0)
    with pytest.raises(TypeError, match="from must be Byte"):
        ops.combine(byte.int(), byte.clone(), 8, 0)
