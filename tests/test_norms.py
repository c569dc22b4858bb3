"""L2 norms and sums of squares: native kernels give the bits of the reference."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    as_numpy,
    assert_same,
    bits_of,
    data,
    gradient_like,
    instruction_set,
    name,
    norms,
    shared_norms,
    squares,
)

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.reference import linear as reference

BLOCKS = [1, 7, 256, 1000, 1024, 1500, None]
SIZES = [0, 1, 3, 1023, 1024, 1025, 5000]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_squares_and_l2_norms(dtype: torch.dtype) -> None:
    """All sizes, blocks and kinds of numbers, on every instruction set."""
    rng = np.random.default_rng(0)
    for block_size, numel, kind in itertools.product(BLOCKS, SIZES, range(4)):
        x = data(rng, kind, numel, dtype)
        rows = np.stack([as_numpy(x), as_numpy(x.roll(1))])
        largest = reference.shared_norms(rows, block_size, "max")
        expected = reference.squares(rows[0], largest, block_size)
        # Of many ranks, and rubbish such as no ranks add up to.
        total = expected * int(rng.integers(1, 1000))
        total[::10] = rng.integers(-(2**63), 2**63 - 1, len(total[::10]))
        with np.errstate(invalid="ignore"):
            l2 = reference.l2_norms(largest, np.where(total < 0, 0, total))
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                what = (isa, block_size, numel, kind)
                assert_same(squares(x, torch.from_numpy(largest), block_size), expected, what)
                got = torch.from_numpy(largest.copy())
                ops.l2_norms(got, torch.from_numpy(total))
                assert_same(got, l2, what)


def test_l2_norms_are_the_norm() -> None:
    """sqrt(sum of x^2) of a block over all ranks, whatever its scale, to 2^-15 of M an element."""
    rng = np.random.default_rng(0)
    for dtype, exponents in ((torch.float32, (-126, 0, 100)), (torch.float64, (-1022, 0, 1000))):
        for exponent, block_size in itertools.product(exponents, (7, 1000, 5000)):
            unit = gradient_like(rng, (3, 5000), torch.float64).to(dtype)
            unit = unit / unit.abs().max()
            got = shared_norms(unit * 2.0**exponent, block_size, "l2")
            got = got.view(dtype).double() * 2.0**-exponent
            parts = unit.double().split(block_size, dim=1)
            exact = torch.stack([part.square().sum().sqrt() for part in parts])
            assert (got >= torch.stack([part.abs().max() for part in parts]) * (1 - 1e-6)).all()
            assert torch.allclose(got, exact, rtol=3e-3 if dtype == torch.float32 else 1e-3)


def test_l2_norms_never_shrink_and_stay_finite() -> None:
    """Not for any sum of squares, as a norm below M would cut off values."""
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        largest = torch.tensor(
            [0, info.smallest_normal / 4, 1e-30, 1, info.max / 2, info.max, torch.inf, torch.nan],
            dtype=dtype,
        )
        for total in (-(2**63), -1, 0, 1, 2**30, 2**40, 2**63 - 1):
            got = largest.clone().view(layout.norm_dtype(dtype))
            ops.l2_norms(got, torch.full((8,), total))
            got = got.view(dtype)
            assert (got[:6] >= largest[:6]).all()
            assert got[:6].isfinite().all()
            assert torch.equal(bits_of(got[6:]), bits_of(largest[6:]))
            if total <= 2**30:
                assert torch.equal(got[:6], largest[:6])


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_values_beyond_their_norm_do_not_overflow_squares(dtype: torch.dtype) -> None:
    """An element gives 2^30 at the most."""
    x = torch.tensor([2, -2, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    one = norms(torch.ones(1, dtype=dtype), None)
    assert squares(x, one, None).tolist() == [5 * 2**30]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_sum_of_squares(dtype: torch.dtype, thread_count: Callable[[int], None]) -> None:
    """The same bits for each instruction set and number of threads, and the right ones."""
    rng = np.random.default_rng(0)
    for numel in (0, 1, 15, 16, 17, 1000, 65535, 65536, 65537, 300_001):
        x = gradient_like(rng, numel, dtype)
        results = set()
        for isa, threads in itertools.product(ops.instruction_sets(), (1, 4)):
            thread_count(threads)
            with instruction_set(isa):
                results.add(ops.sum_of_squares(x).item())
        assert len(results) == 1
        assert results.pop() == pytest.approx((x.double().numpy() ** 2).sum(), rel=1e-13)
    assert ops.sum_of_squares(torch.full((3, 5), 100, dtype=dtype)) == 15 * 100**2
    assert ops.sum_of_squares(torch.tensor([1, torch.nan], dtype=dtype)).isnan()
    assert ops.sum_of_squares(torch.tensor([1, -torch.inf], dtype=dtype)) == np.inf


# --- errors --------------------------------------------------------------------------------------

X = torch.ones(100)
NORMS = torch.zeros(10, dtype=torch.int32)
SQUARES = torch.zeros(10, dtype=torch.int64)


def test_the_calls_that_the_errors_below_start_from_are_valid() -> None:
    """Or the tests of errors would say little."""
    ops.block_squares(X, NORMS, SQUARES.clone(), 10)
    ops.l2_norms(NORMS.clone(), SQUARES)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.block_squares(X, NORMS[1:], SQUARES, 10), ValueError,
            "norms must have 10 elements, got 9",
        ),
        (
            lambda: ops.block_squares(X, NORMS, SQUARES[1:], 10), ValueError,
            "squares must have 10 elements, got 9",
        ),
        (
            lambda: ops.block_squares(X, NORMS, SQUARES.int(), 10), TypeError,
            "squares must be Long, got Int",
        ),
        (
            lambda: ops.block_squares(X, NORMS, SQUARES, 0), ValueError,
            "block_size must be at least 1, got 0",
        ),
        (
            lambda: ops.l2_norms(NORMS.float(), SQUARES), TypeError,
            "norms must be Int or Long, got Float",
        ),
        (
            lambda: ops.l2_norms(NORMS, SQUARES[1:]), ValueError,
            "squares must have 10 elements, got 9",
        ),
        (
            lambda: ops.l2_norms(NORMS.repeat(2)[::2], SQUARES), ValueError,
            "norms must be contiguous",
        ),
        (lambda: ops.sum_of_squares(X.int()), TypeError, "the tensor must be float16, bfloat16"),
        (lambda: ops.sum_of_squares(X[::2]), ValueError, "the tensor must be contiguous"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    """They say what is wrong, what was got, and what is accepted."""
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name)
def test_opcheck(dtype: torch.dtype) -> None:
    """Schemas tell what is written, and the ops pass through ``torch.compile``."""
    x = gradient_like(np.random.default_rng(0), 1500, dtype)
    shared, total = norms(x, 1024), torch.zeros(2, dtype=torch.int64)
    torch.library.opcheck(ops.block_squares, (x, shared, total, 1024))
    torch.library.opcheck(ops.l2_norms, (shared, total))
