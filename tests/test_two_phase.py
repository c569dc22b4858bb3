"""The two-phase exchange: native kernels give the reference's bits, and means are unbiased."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    TWO_PHASE_CODES,
    as_numpy,
    assert_same,
    bits_of,
    chi_square_normal,
    decode_means,
    exchange,
    instruction_set,
    name,
    requantize,
    send,
    several,
    shared_norms,
    special_values,
    threshold,
    tiles_of,
)
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.reference import two_phase as reference_two_phase
from hvd_gqsgd.reference.kinds import Code, exponential, linear

BLOCKS = [1, 7, 256, 1000, 1024, 1500, None]
SIZES = [0, 1, 3, 1023, 1024, 1025, 5000]
RANKS = [1, 2, 3, 5, 7]


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_reference(dtype: torch.dtype, code: Code) -> None:
    """All sizes and blocks, any cut into segments, on every instruction set."""
    rng = np.random.default_rng(code.bits)
    cases = itertools.cycle(itertools.product(RANKS, range(5), ["max", "l2"], [True, False]))
    for block_size, numel in itertools.product(BLOCKS, SIZES):
        for _ in range(7):  # so that sizes next to each other meet with different numbers and ranks
            n, kind, norm, correlated = next(cases)
        if block_size in (1, 7) and numel == 5000:
            n, numel = min(n, 3), 300
        rows = several(rng, kind, (n, numel), dtype)
        at = {
            "seed": int(rng.integers(-(2**63), 2**63 - 1)),
            "step": int(rng.integers(0, 2**31)),
            "tensor_id": int(rng.integers(0, 2**31)),
        }
        what = (block_size, numel, n, kind, norm, correlated, at)
        expected = reference_two_phase.two_phase_mean(
            as_numpy(rows), dither=code.dither, bits=code.bits, block_size=block_size, norm=norm,
            correlated=correlated, **at,
        )  # fmt: skip
        tiles = tiles_of(numel, block_size, code.bits)
        cuts = sorted(int(cut) for cut in rng.integers(0, tiles + 1, 3))
        whole = exchange(rows, code, block_size, norm, correlated, **at)
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                parts = exchange(rows, code, block_size, norm, correlated, cuts, **at)
            assert_same(parts[3], expected, (isa, what))
            assert all(torch.equal(a, b) for a, b in zip(whole[:3], parts[:3], strict=True)), what


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
def test_empty_ranges(code: Code) -> None:
    """An owner of no tiles has nothing to do, at the beginning, in the middle and at the end."""
    shared = torch.zeros(2, dtype=torch.int32)
    words = torch.zeros(3, 0, dtype=layout.word_dtype(code.bits))
    means = torch.zeros(0, dtype=words.dtype)
    for tile in range(5):
        ops.requantize(words, shared, means, 2100, 1500, *code, tile % 4, tile % 4, 0, 0, 0)
    whole = exchange(torch.ones(3, 2100), code, 1500)
    cut = exchange(torch.ones(3, 2100), code, 1500, cuts=[0, 0, 1, 1, 3, 3])
    assert torch.equal(whole[2], cut[2])


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
def test_rows_may_lie_apart(code: Code) -> None:
    """As columns of a bigger buffer, or all the same one."""
    rng = np.random.default_rng(0)
    rows = several(rng, 0, (3, 3000), torch.float32)
    shared, words, means, _ = exchange(rows, code, 1500)
    wide = torch.full((3, words.shape[1] + 9), -77, dtype=words.dtype)
    wide[:, 4:-5] = words
    assert torch.equal(requantize(wide[:, 4:-5], shared, 3000, 1500, code), means)
    same = words[:1].expand(3, -1)
    expected = requantize(same.contiguous(), shared, 3000, 1500, code)
    assert torch.equal(requantize(same, shared, 3000, 1500, code), expected)


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype: torch.dtype, code: Code) -> None:
    """What all ranks agree on comes back as it is, if it is a maximum; NaN and infinity as NaN."""
    x = special_values(dtype)
    *_, back = exchange(x.expand(4, -1), code, 1)
    finite = x.isfinite()
    assert back[~finite].isnan().all()
    assert torch.equal(bits_of(back[finite]), bits_of(x[finite] + 0))


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_zeros_and_blocks_that_are_not_finite(dtype: torch.dtype, norm: str, code: Code) -> None:
    """Those of one rank make that block NaN; zeros stay zeros; others are as without them."""
    rows = several(np.random.default_rng(0), 0, (3, 100), dtype)
    rows[:, 10:20] = 0
    rows[1, 15:20] = -0.0
    *_, clean = exchange(rows, code, 10, norm)
    rows[1, 33], rows[2, 44] = torch.nan, torch.inf
    *_, back = exchange(rows, code, 10, norm)
    assert back[30:50].isnan().all()
    rest = torch.cat([torch.arange(30), torch.arange(50, 100)])
    assert torch.equal(bits_of(back[rest]), bits_of(clean[rest]))
    assert torch.equal(back[10:20], torch.zeros(10, dtype=dtype))
    assert back[rest].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
def test_magnitudes_do_not_matter(code: Code, dtype: torch.dtype) -> None:
    """From subnormal to 3e38: a gradient times a power of two gives the mean times it."""
    rows = several(np.random.default_rng(0), 0, (3, 1000), dtype)
    rows = rows / rows.abs().max()
    *_, back = exchange(rows, code, None)
    for exponent in (-100, -60, 60, 100, 127):
        factor = 2.0**exponent
        *_, scaled = exchange(rows * factor, code, None)
        # What is now subnormal has lost some places; exponential codes tell such small numbers.
        exact = back.abs() * factor >= 2.0**-120
        assert torch.equal(scaled[exact], back[exact] * factor)
    tiny = torch.full((3, 10), 3e-45, dtype=dtype)
    assert torch.allclose(exchange(tiny, code, None)[3], tiny[0], rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("code", "norm"),
    [
        (exponential(8), "max"),
        (exponential(8), "l2"),
        (linear(8, 127), "max"),
        (linear(8, 127), "l2"),
        (linear(3, 3), "max"),
    ],
    ids=str,
)
def test_unbiased(code: Code, norm: str) -> None:
    """The whole exchange: an element's errors over steps average out.

    The squared z scores of 64 elements add up to a chi-square. Each of the 5 comparisons alarms
    falsely in one of 10^6 cases. If the second rounding takes the same dither in all steps, its
    errors do not average out, and the same comparison says so.
    """
    limit = threshold(1e-6)
    rng = np.random.default_rng(3)
    rows = torch.from_numpy(rng.choice([-1, 1], 64) * rng.uniform(0.3, 1, (3, 64))).float()
    exact = rows.double().mean(0)
    shared = shared_norms(rows, None, norm)
    fair, stuck = [], []
    for step in range(1000):
        words = send(rows, shared, None, code, step=step)
        for decoded, second in ((fair, step), (stuck, 0)):
            means = requantize(words, shared, 64, None, code, step=second)
            decoded.append(decode_means(means, shared, rows[0], None, code))
    assert bias(torch.stack(fair), exact) < limit
    assert bias(torch.stack(stuck), exact) > limit


def bias(decoded: Tensor, exact: Tensor) -> float:
    """How far the mean over the rows is from what it should be, as a standard normal number."""
    draws = decoded.double()
    z = (draws.mean(0) - exact) / (draws.std(0) / np.sqrt(len(draws)))
    return chi_square_normal(float((z**2).sum()), len(exact))


@pytest.mark.parametrize("code", [exponential(4), exponential(8), linear(8, 127)], ids=str)
def test_the_second_rounding_has_a_dither_of_its_own(code: Code) -> None:
    """Of seed, step, tensor and tile, each of which counts, and of nothing else."""
    rows = several(np.random.default_rng(0), 0, (3, 1024), torch.float32).repeat(1, 2)
    shared = shared_norms(rows, 1024, "max")
    words = send(rows, shared, 1024, code)
    halves = words.chunk(2, dim=1)
    words = torch.cat([halves[0], halves[0]], dim=1)  # the same in both tiles
    seen = []
    for at in ({}, {"seed": 1}, {"step": 1}, {"tensor_id": 1}):
        seen += requantize(words, shared, 2048, 1024, code, **at).chunk(2)
    for one, other in itertools.combinations(seen, 2):
        assert one[0] == other[0]  # the same norm of the means
        assert not torch.equal(one, other)
    assert torch.equal(seen[0], requantize(words, shared, 2048, 1024, code).chunk(2)[0])


@pytest.mark.parametrize("code", [exponential(8), linear(5, 15)], ids=str)
def test_threads_do_not_matter(code: Code, thread_count: Callable[[int], None]) -> None:
    """Enough elements for several threads."""
    rows = several(np.random.default_rng(0), 0, (2, 200_001), torch.float32)
    results = []
    for threads in (1, 3):
        thread_count(threads)
        for block_size in (7, 50_000):
            results.append(exchange(rows, code, block_size, "l2"))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(map(torch.equal, one, other))
