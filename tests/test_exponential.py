"""Exponential dithering: native codes are those of the reference, and unbiased.

Statistics are in standard deviations of a normal number. Each of the file's comparisons, of which
there are less than 100, would reject a perfect generator once in 10^9 cases: that makes one false
alarm of the file in ten million. Seeds are fixed, so that it passes always or never.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    Array,
    as_numpy,
    assert_same,
    bits_of,
    data,
    decode_means,
    encode,
    gradient_like,
    instruction_set,
    name,
    norms,
    random_place,
    requantize,
    special_values,
    threshold,
)
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference.kinds import EXPONENTIAL, Code, exponential
from hvd_gqsgd.reference.two_phase import exponential_codes, exponential_levels

LIMIT = threshold(1e-9)
WIDTHS = [4, 8]
LOWEST = {4: 2.0**-6, 8: 2.0**-126}
BLOCKS = [1, 7, 256, 1000, 1024, 1500, None]
SIZES = [0, 1, 3, 1023, 1024, 1025, 5000]
WORLDS = [(0, 1, True), (0, 1, False), (1, 2, True), (2, 3, False), (2, 3, True), (6, 7, True)]


def native_codes(x: Tensor, norms: Tensor, block_size: int | None, bits: int, **at: Any) -> Array:
    """Codes of one rank, out of native words."""
    words = encode(x, norms, block_size, exponential(bits), **at)
    return reference.unpack(words.numpy(), x.numel(), block_size, bits, 0, 1) % (1 << bits)


def comes_back(x: Tensor, block_size: int | None, bits: int, seed: int = 0) -> Tensor:
    """What one rank alone decodes: its second rounding finds nothing to round."""
    maxima = norms(x, block_size)
    code = exponential(bits)
    words = encode(x, maxima, block_size, code, seed=seed)[None]
    means = requantize(words, maxima, x.numel(), block_size, code, seed=seed)
    return decode_means(means, maxima, x, block_size, code)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_reference(dtype: torch.dtype, bits: int) -> None:
    """Words: all sizes, blocks and kinds of numbers, on every instruction set."""
    rng = np.random.default_rng(bits)
    worlds = itertools.cycle(WORLDS)
    for block_size, numel, kind in itertools.product(BLOCKS, SIZES, range(4)):
        rank, world_size, correlated = next(worlds)
        x = data(rng, kind, numel, dtype)
        place = random_place(rng, rank, world_size, correlated)
        # Another rank has the same numbers in other places, so that not all maxima are this one's.
        rows = np.stack([as_numpy(x), as_numpy(x.roll(1))])
        shared = reference.shared_norms(rows, block_size, "l2" if kind == 0 else "max")
        xi = reference.dither(numel, block_size, **place)
        codes = exponential_codes(rows[0], shared, block_size, bits, xi)
        words = reference.pack(codes, block_size, bits, 0)
        assert codes.min(initial=0) >= 0
        assert codes.max(initial=0) < 2**bits
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                got = encode(x, torch.from_numpy(shared), block_size, exponential(bits), **place)
                assert_same(got, words, (isa, block_size, numel, kind, place))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_float_between_levels(bits: int) -> None:
    """Shares at, next to and between all levels, and below the lowest one."""
    exponents = np.arange(-150, 1)
    mantissas = np.array([1, 1 + 2**-23, 1.25, 4 / 3, 1.5, 2 - 2**-23])
    shares = np.ldexp(mantissas, exponents[:, None]).ravel()
    shares = shares[shares <= 1].astype(np.float32)
    x = torch.from_numpy(np.repeat(np.concatenate([shares, -shares]), 64))
    one = torch.ones(1).view(torch.int32)
    xi = reference.dither(x.numel(), None, seed=1, step=2, tensor_id=3, rank=0, world_size=1,
                          correlated=True)  # fmt: skip
    expected = exponential_codes(x.numpy(), one.numpy(), None, bits, xi)
    for isa in ops.instruction_sets():
        with instruction_set(isa):
            got = native_codes(x, one, None, bits, seed=1, step=2, tensor_id=3)
        assert (got == expected).all()
    # Each goes to one of the two levels around it.
    level = abs(exponential_levels(got, bits).astype(np.float64))
    share = abs(x.numpy().astype(np.float64))
    assert (level[share >= LOWEST[bits]] / share[share >= LOWEST[bits]] > 0.5).all()
    assert (level[share >= LOWEST[bits]] / share[share >= LOWEST[bits]] < 2).all()
    assert set(level[share < LOWEST[bits]]) <= {0, LOWEST[bits]}


def test_levels() -> None:
    """As the specification counts them, all powers of two and zeros of both signs."""
    for bits, lowest in LOWEST.items():
        levels = exponential_levels(np.arange(2**bits), bits)
        half = 2 ** (bits - 1)
        assert levels[0] == levels[half] == 0
        assert levels[half - 1] == 1
        assert levels[1] == lowest
        assert (levels[2:half] == 2 * levels[1 : half - 1]).all()
        assert (levels[half:] == -levels[:half]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_and_zeros_are_never_moved(bits: int, dtype: torch.dtype) -> None:
    """Whatever the dither: many seeds. Norms are powers of two, so that shares are exact."""
    for norm in (1.0, 2.0**-13, 2.0**14):
        levels = torch.from_numpy(exponential_levels(np.arange(2**bits), bits)).double() * norm
        x = levels.to(dtype)
        x = x[x.double() == levels]  # the type may not hold them all
        for seed in range(100):
            back = comes_back(x, None, bits, seed)
            assert torch.equal(bits_of(back), bits_of(x + 0))  # zeros lose their sign


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("bits", WIDTHS)
def test_maxima_are_never_moved(bits: int, dtype: torch.dtype) -> None:
    """Alone in its block, each number is a maximum, and so exact; except for NaN and infinity."""
    x = torch.cat([data(np.random.default_rng(0), 2, 5000, dtype), special_values(dtype)])
    for isa in ops.instruction_sets():
        with instruction_set(isa):
            back = comes_back(x, 1, bits)
        finite = x.isfinite()
        assert 0 < (~finite).sum() < 20
        assert torch.equal(bits_of(back[finite]), bits_of(x[finite] + 0))
        assert back[~finite].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("bits", WIDTHS)
def test_values_beyond_their_norm_are_cut_off(bits: int, dtype: torch.dtype) -> None:
    """So a gradient that changes after its norm was taken cannot spill into another lane."""
    x = torch.tensor([2, -2, torch.inf, -torch.inf, torch.nan, 0, 1, 0.5], dtype=dtype).repeat(20)
    for norm in (1.0, 2.0**-20, 0.0):
        one = torch.tensor([norm], dtype=dtype)
        maxima = norms(one, None)
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                level = exponential_levels(native_codes(x, maxima, None, bits), bits)
            level = level.reshape(20, 8)
            if norm:
                assert (level[:, [0, 2]] == 1).all()
                assert (level[:, [1, 3]] == -1).all()
                assert (abs(level[:, 4]) == 1).all()
            # Its neighbours in the word are as they would be without it.
            assert (level[:, 5] == 0).all()
            assert (level[:, 6] == (norm > 0)).all()


def test_a_gradient_that_is_not_finite_is_nan_and_alone() -> None:
    """Blocks with NaN or infinity decode to NaN, zero blocks to zeros, others as if alone."""
    x = gradient_like(np.random.default_rng(0), 5000)
    x[1500] = torch.nan
    x[3100] = -torch.inf
    x[4000:4500] = 0
    for bits in WIDTHS:
        back = comes_back(x, 500, bits).view(10, 500)
        assert back[[3, 6]].isnan().all()
        assert torch.equal(bits_of(back[8]), bits_of(torch.zeros(500)))
        assert back[[0, 1, 2, 4, 5, 7, 9]].isfinite().all()


# --- statistics ----------------------------------------------------------------------------------

# Shares, where the level at or below is 2^-1, 2^-3, the lowest one of 4 bits, and 0 (of 4 bits).
SHARES = [2 / 3, 0.51, 0.99, 3 / 16, 4 / 3 * 2**-6, 2**-6 * 0.3, 2**-6 * 0.9]
DRAWS = 2**17


def draws(share: float, bits: int, dtype: torch.dtype = torch.float32, **at: Any) -> Array:
    """Decoded codes of a share in so many places, of tiles that all have a norm of 3."""
    x = torch.full((DRAWS // 1024, 1024), 3 * share, dtype=dtype)
    x[:, 0] = 3
    codes = native_codes(x.flatten(), norms(x.flatten(), 1024), 1024, bits, **at)
    levels = exponential_levels(codes, bits).astype(np.float64).reshape(x.shape)
    assert (levels[:, 0] == 1).all()
    return levels[:, 1:].ravel()


def around(share: float, bits: int) -> tuple[float, float]:
    """The two levels next to a share."""
    below = 2.0 ** np.floor(np.log2(share))
    return (below, 2 * below) if below >= LOWEST[bits] else (0.0, LOWEST[bits])


def bias(levels: Array, share: float, bits: int) -> float:
    """How far the mean is from the share, in standard deviations of a mean of fair draws."""
    below, above = around(share, bits)
    spread = np.sqrt((share - below) * (above - share) / levels.size)
    return float(abs(levels.mean() - share) / spread)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("share", SHARES)
def test_unbiased(share: float, bits: int) -> None:
    """Each rank's code is, with the dither of its own and with the correlated one."""
    for dtype, sign in ((torch.float32, 1), (torch.float64, -1)):
        for correlated in (False, True):
            place = {"rank": 2, "world_size": 3, "correlated": correlated, "seed": 4}
            levels = sign * draws(sign * share, bits, dtype, **place)
            assert set(levels) == set(around(share, bits))
            assert bias(levels, share, bits) < LIMIT


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("share", SHARES)
def test_rounding_to_nearest_is_rejected(share: float, bits: int) -> None:
    """By the statistic above: it moves a share to the same level each time."""
    x, one = np.full(DRAWS, share, np.float32), np.ones(1, np.float32).view(np.int32)
    half = np.full(DRAWS, 2**31, np.uint32)
    levels = exponential_levels(exponential_codes(x, one, None, bits, half), bits)
    assert len(set(levels)) == 1
    assert abs(levels[0] - share) <= np.diff(around(share, bits))[0] / 2
    assert bias(levels.astype(np.float64), share, bits) > LIMIT


def test_the_worst_variance_is_an_eighth() -> None:
    """Of a code of y between a and 2a, as a share of y^2: (y - a) (2a - y) / y^2, worst at 4a/3.

    The fourth moment tells how far the variance of so many draws strays.
    """
    for bits in WIDTHS:
        for below in (0.5, 0.125, 2.0**-6):
            relative = []
            for factor in (1.02, 1.15, 4 / 3, 1.6, 1.9):
                share = factor * below
                deviation = draws(share, bits, seed=9) / share - 1
                squares = deviation**2
                stray = LIMIT * squares.std() / np.sqrt(squares.size)
                expected = (factor - 1) * (2 - factor) / factor**2
                assert abs(squares.mean() - expected) < stray + 1e-6
                assert squares.mean() <= 0.125 + stray
                relative.append(squares.mean())
            assert max(relative) == relative[2]
            assert relative[2] == pytest.approx(0.125, rel=0.1)


def test_correlated_ranks_have_less_variance() -> None:
    """Of the mean over the ranks of one number, than independent ones."""
    variance = {}
    for correlated in (False, True):
        ranks = [
            draws(4 / 6, 8, rank=rank, world_size=4, correlated=correlated) for rank in range(4)
        ]
        variance[correlated] = np.mean(ranks, axis=0).var()
    # Of 4 fair coins for (2/3 - 1/2) / (1/2) = 1/3, one or two come up if they are correlated.
    assert variance[False] == pytest.approx(2 / 9 / 4 / 4, rel=0.05)
    assert variance[True] == pytest.approx(2 / 9 / 16 / 4, rel=0.05)


# --- errors --------------------------------------------------------------------------------------

WIDTHS_MESSAGE = "bits must be 4 or 8 for exponential codes, got "
LEVELS_MESSAGE = "levels must be 127 for exponential codes of 8 bits, got "
X = torch.ones(100)
NORMS = torch.zeros(10, dtype=torch.int32)
WORDS = torch.zeros(30, dtype=torch.int32)


CODE = exponential(8)


def quantize(norms: Tensor = NORMS, words: Tensor = WORDS, code: Code = CODE) -> None:
    """A valid call, of which each test spoils one argument."""
    ops.quantize(X, norms, words, 10, *code, 0, 0, 0, 0, 1, True)


def test_the_call_that_the_errors_below_start_from_is_valid() -> None:
    """Or the tests of errors would say little."""
    quantize()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(code=exponential(2)), ValueError, WIDTHS_MESSAGE + "2"),
        (lambda: quantize(code=exponential(16)), ValueError, WIDTHS_MESSAGE + "16"),
        (lambda: quantize(code=Code(EXPONENTIAL, 8, 0)), ValueError, LEVELS_MESSAGE + "0"),
        (lambda: quantize(code=Code(EXPONENTIAL, 8, 126)), ValueError, LEVELS_MESSAGE + "126"),
        (lambda: quantize(code=Code(EXPONENTIAL, 8, 128)), ValueError, LEVELS_MESSAGE + "128"),
        (lambda: quantize(code=exponential(4)), ValueError, "words must have 20 elements, got 30"),
        (lambda: quantize(words=WORDS.long()), TypeError, "words must be Int, got Long"),
        (lambda: quantize(norms=NORMS[1:]), ValueError, "norms must have 10 elements, got 9"),
        (
            lambda: ops.dequantize(WORDS, NORMS, X.clone(), 10, *CODE, 1, 1.0), ValueError,
            "kind must be one of codes that can be added, got 1 (exponential)",
        ),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    """They say what is wrong, what was got, and what is accepted."""
    with pytest.raises(error, match=re.escape(message)):
        call()
