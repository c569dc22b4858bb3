"""``simulate``: the mean that n ranks decode is unbiased, as near as promised, and never overflows.

Errors are in levels of their block, M / s. Each statistical comparison of this file, of which there
are less than 300, would reject a right implementation less than once in 10^9 cases: that makes one
false alarm of the file in three million. Seeds are fixed, so that it passes always or never.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    Array,
    bits_of,
    chi_square_normal,
    gradient_like,
    name,
    random_floats,
    threshold,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import hvd_gqsgd
from hvd_gqsgd import DynamicBits, simulate
from hvd_gqsgd.codecs import LinearCodec
from hvd_gqsgd.reference import linear as reference

LIMIT = threshold(1e-9)
WORLDS = [2, 3, 4, 5, 7, 8, 16]
RNG = np.random.default_rng


def level(rows: Tensor, bits: int, block_size: int | None) -> Array:
    """M / s for each element, in float64."""
    n, numel = rows.shape
    size = block_size or max(numel, 1)
    magnitudes = rows.abs().amax(0).double().numpy()
    maxima = [magnitudes[i : i + size].max() for i in range(0, numel, size)]
    return np.repeat(maxima, size)[:numel] / reference.levels(bits, n)


def errors(
    rows: Tensor, steps: int, *, bits: int = 8, block_size: int | None = 1024, **options: Any
) -> Array:
    """What each step's mean is off by, in levels: (steps, elements). Of an Allreduce."""
    options["exchange"] = "allreduce"
    decoded = torch.stack(
        [
            simulate(rows, step=step, bits=bits, block_size=block_size, **options)
            for step in range(steps)
        ]
    )
    error = decoded.double().numpy() - rows.double().mean(0).numpy()
    return error / level(rows, bits, block_size)


def errors_with_dither(rows: Tensor, xi: float, bits: int = 8) -> Array:
    """The same for one step with the same number for all dither: (elements,)."""
    n, numel = rows.shape
    s = reference.levels(bits, n)
    shared = np.max([reference.norms(x, 1024) for x in rows.numpy()], axis=0)
    fixed = np.full(numel, xi * 2**32, np.uint32)
    sums = sum(reference.codes(x, shared, 1024, s, fixed, bits) for x in rows.numpy())
    decoded = reference.decode(np.asarray(sums), shared, 1024, s, 1 / n, np.float32)
    return (decoded - rows.double().mean(0).numpy()) / level(rows, bits, 1024)


def bias_z(errors: Array, direction: Array | float) -> float:
    """How far errors go in a direction, in standard deviations of unbiased ones."""
    return float((errors * direction).sum() / np.sqrt((errors**2).sum()))


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("n", WORLDS)
def test_unbiased(n: int, bits: int, correlated: bool) -> None:
    """In three directions; rounding to nearest and rounding down fail the same test."""
    steps = 50
    rows = gradient_like(RNG(n), (n, 4096))
    nearest, down = errors_with_dither(rows, 0.5, bits), errors_with_dither(rows, 0, bits)
    to_nearest, outwards = np.sign(nearest), np.sign(rows.mean(0).numpy())

    off = errors(rows, steps, bits=bits, correlated=correlated)
    for direction in (1.0, outwards, to_nearest):
        assert abs(bias_z(off, direction)) < LIMIT

    assert bias_z(np.tile(nearest, (steps, 1)), to_nearest) > LIMIT
    assert bias_z(np.tile(down, (steps, 1)), 1.0) < -LIMIT


def variance(rows: Tensor) -> Array:
    """Of each element, with independent dither: sum f_r (1 - f_r) / n^2 for fractions f_r."""
    places = rows.double().numpy() / level(rows, 8, 1024)
    fractions = places - np.floor(places)
    return (fractions * (1 - fractions)).sum(0) / len(rows) ** 2


@pytest.mark.parametrize("n", WORLDS)
def test_each_element_is_unbiased(n: int) -> None:
    """Not just their sum: a chi-square test of their means, which rounding to nearest fails."""
    rows = gradient_like(RNG(n), (n, 1024))
    expected = variance(rows)
    varies = expected > 0.1 / n**2  # so that 300 steps make a mean nearly normal
    assert varies.sum() > 300

    def statistic(means: Array) -> float:
        return chi_square_normal((300 * means**2 / expected)[varies].sum(), int(varies.sum()))

    assert abs(statistic(errors(rows, 300, correlated=False).mean(0))) < LIMIT
    assert statistic(errors_with_dither(rows, 0.5)) > LIMIT


@pytest.mark.parametrize("n", WORLDS)
def test_variance_of_independent_dither(n: int) -> None:
    """It is what it should be, and at most 1/(4n); and no error ever reaches a level."""
    rows = gradient_like(RNG(n), (n, 4096))
    off = errors(rows, 50, correlated=False)
    assert (off**2).mean() == pytest.approx(variance(rows).mean(), rel=0.03)
    assert (off**2).mean() < 1 / (4 * n)
    assert abs(off).max() < 1 + 1e-5


@pytest.mark.parametrize("n", WORLDS)
def test_variance_bound_is_tight(n: int) -> None:
    """Half way between levels, independent dither comes within a tenth of 1/(4n)."""
    s = reference.levels(8, n)
    rows = torch.full((n, 4096), 0.5 / s, dtype=torch.float64)
    rows[:, ::1024] = 1
    inner = np.arange(4096) % 1024 > 0
    off = errors(rows, 20, correlated=False)[:, inner]
    assert (off**2).mean() == pytest.approx(1 / (4 * n), rel=0.1)


@pytest.mark.parametrize("n", WORLDS)
def test_correlated_dither_lowers_the_error(n: int) -> None:
    """By 2n / (n + 1) in the mean square, where what is to be rounded away is uniform.

    n ranks round off sum_r (1[xi_r >= 1 - f_r] - f_r), whose mean square is n/12 + Var(sum_r xi_r).
    The second term is n/12 for independent dither and 1/12 for stratified, as frac(nU) varies.
    """
    rows = torch.from_numpy(RNG(n).uniform(-1, 1, (n, 8192)))
    independent = (errors(rows, 10, correlated=False) ** 2).mean()
    correlated = (errors(rows, 10, correlated=True) ** 2).mean()
    assert independent == pytest.approx(1 / (6 * n), rel=0.05)
    assert correlated == pytest.approx((n + 1) / (12 * n**2), rel=0.05)


@pytest.mark.parametrize("n", WORLDS)
def test_correlated_dither_on_gradients(n: int) -> None:
    """There it helps too."""
    rows = gradient_like(RNG(n), (n, 8192))
    independent = (errors(rows, 10, correlated=False) ** 2).mean()
    assert (errors(rows, 10, correlated=True) ** 2).mean() < 0.85 * independent


@pytest.mark.parametrize("n", WORLDS)
def test_equal_inputs_are_as_fine_as_n_times_s_levels(n: int) -> None:
    """With correlated dither, where all ranks agree; with independent dither they are not."""
    rows = gradient_like(RNG(n), (1, 8192)).double().expand(n, -1)
    correlated = errors(rows, 10, correlated=True)
    assert abs(correlated).max() < 1 / n + 1e-6
    assert abs(errors(rows, 10, correlated=False)).max() > 1 / n + 0.1


@pytest.mark.parametrize("options", [
    {}, {"bits": 2}, {"bits": 4, "exchange": "two_phase"}, {"dither": "exponential"},
    {"norm": "l2", "block_size": None}, {"bits": DynamicBits(3, total_steps=9)},
], ids=str)  # fmt: skip
def test_one_rank_keeps_what_it_has(options: dict[str, Any]) -> None:
    """Nothing is exchanged, so nothing is rounded; not even NaN spreads."""
    for dtype in DTYPES:
        row = gradient_like(RNG(1), 5000, dtype)
        row[7], row[8] = float("nan"), float("inf")
        assert torch.equal(bits_of(simulate(row[None], **options)), bits_of(row))


def test_error_falls_with_the_number_of_trials() -> None:
    """As 1 / sqrt(K) for the mean over K steps: there is no bias to stay behind."""
    rows = gradient_like(RNG(0), (3, 16384))
    off = errors(rows, 256)
    single = np.sqrt((off**2).mean())
    for k in (1, 2, 4, 16, 64, 256):
        averaged = np.sqrt((off[:k].mean(0) ** 2).mean())
        assert averaged * np.sqrt(k) == pytest.approx(single, rel=0.06)


def test_equal_maxima_never_overflow() -> None:
    """All ranks at the maximum: for each number of levels the most ranks that have it, as fewer of
    them have a smaller sum."""
    maxima = torch.tensor([1.0, 0.1, 7.3, 3.4028235e38, 1.1754944e-38, 1e-45, 2.9387e-39])
    row = torch.stack([maxima, -maxima], 1).flatten()
    most_ranks = {255 // (2 * n): n for n in range(1, 128)}
    assert len(most_ranks) > 20
    for n in most_ranks.values():
        mean = simulate(row.expand(n, -1), bits=8, block_size=2, exchange="allreduce")
        assert mean.isfinite().all(), n
        torch.testing.assert_close(mean, row, rtol=1.2e-7, atol=0, msg=f"{n} ranks")


def test_too_many_ranks_for_the_width() -> None:
    """The error names the width that works."""
    with pytest.raises(ValueError, match=r"bits=8 is too narrow for 128 ranks.* at least 9"):
        simulate(torch.ones(128, 10), bits=8, exchange="allreduce")
    assert simulate(torch.ones(128, 10), bits=9, exchange="allreduce").tolist() == [1.0] * 10


@pytest.mark.parametrize("bits", range(2, 17))
def test_most_ranks_for_each_width(bits: int) -> None:
    """One more is an error that names a width, with which it works."""
    n = min((2**bits - 1) // 2, 300)
    row = torch.tensor([1.0, -1.0, 0.0])
    exchange = {"exchange": "allreduce"}
    torch.testing.assert_close(simulate(row.expand(n, -1), bits=bits, **exchange), row)
    if n < 300:
        with pytest.raises(ValueError, match="too narrow") as caught:
            simulate(row.expand(n + 1, -1), bits=bits, **exchange)
        needed = int(re.findall(r"at least (\d+)", str(caught.value))[0])
        assert needed == bits + 1
        simulate(row.expand(n + 1, -1), bits=needed, **exchange)


def test_what_wraps_when_each_rank_rounds_up() -> None:
    """Codes of ceil(127 x / (n M)), as in published code, leave a byte where all ranks agree."""
    for n in range(2, 65):
        byte = np.full(n, np.ceil(127 / n), np.int8).sum(dtype=np.int8)
        assert byte < 0  # the sum of positive numbers
        rows = torch.full((n, 5), 2.5)
        means = simulate(rows, bits=8, exchange="allreduce")
        torch.testing.assert_close(means, rows[0], rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_not_finite_on_one_rank(dtype: torch.dtype, value: float) -> None:
    """Just that block becomes NaN, and the others are as they would have been."""
    rows = gradient_like(RNG(0), (4, 1000), dtype)
    clean = simulate(rows, block_size=100)
    rows[2, 345] = value
    mean = simulate(rows, block_size=100)
    assert mean[300:400].isnan().all()
    for part in (slice(300), slice(400, None)):
        assert torch.equal(bits_of(mean[part]), bits_of(clean[part]))
        assert clean[part].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_zeros_and_nothing(dtype: torch.dtype) -> None:
    """Zeros stay zeros, and no elements stay none."""
    for block_size in (1, 1024, None):
        zeros = simulate(torch.zeros(3, 2000, dtype=dtype), block_size=block_size)
        assert torch.equal(bits_of(zeros), bits_of(torch.zeros(2000, dtype=dtype)))
        nothing = simulate(torch.zeros(3, 0, dtype=dtype), block_size=block_size)
        assert nothing.shape == (0,)
        assert nothing.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_subnormals(dtype: torch.dtype) -> None:
    """They are rounded to levels, then to numbers that there are, like all others."""
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    integers = torch.from_numpy(RNG(0).integers(-100, 100, (3, 500))).double()
    rows = (integers * smallest).to(dtype)
    assert rows.count_nonzero() > 1400
    assert (rows.abs() < info.smallest_normal).all()
    mean = simulate(rows, bits=8, block_size=50).double() / smallest
    off = (mean - integers.mean(0)).abs().numpy()
    assert (off <= level(integers, 8, 50) + 0.5).all()
    assert mean.count_nonzero() > 400


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy(dtype: Any) -> None:
    """A NumPy array gives a NumPy array, with the same numbers as a tensor."""
    rows = RNG(0).standard_normal((3, 100)).astype(dtype)
    mean = simulate(rows, bits=10)
    assert isinstance(mean, np.ndarray)
    assert mean.dtype == dtype
    assert (mean == simulate(torch.from_numpy(rows), bits=10).numpy()).all()


@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (2, 3, 4)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    message = re.escape(f"gradients must be of shape (ranks, elements), got {shape}")
    with pytest.raises(ValueError, match=message):
        simulate(torch.zeros(shape))
    with pytest.raises(ValueError, match=message):
        simulate(np.zeros(shape))


def test_what_is_no_array() -> None:
    with pytest.raises(TypeError, match="a tensor or a NumPy array, got <class 'list'>"):
        simulate([[1.0, 2.0]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_bad_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"gradients must be dense and .*, got {dtype}"):
        simulate(torch.zeros(2, 5, dtype=dtype))
    with pytest.raises(TypeError, match=f"gradients must be dense and .*, got {dtype}"):
        simulate(torch.zeros(2, 5, dtype=dtype).numpy())


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"bits must be from 2 to 16, .*, got 1"):
        simulate(torch.zeros(2, 5), bits=1)
    with pytest.raises(TypeError, match=r"simulate\(\) got an unknown option 'bit': did you mean"):
        simulate(torch.zeros(2, 5), bit=4)


@pytest.mark.parametrize("step", [-1, 2**30 + 1])
def test_bad_steps(step: int) -> None:
    with pytest.raises(ValueError, match=f"step must be from 0 to 1073741824, got {step}"):
        simulate(torch.zeros(2, 5), step=step)
    with pytest.raises(TypeError, match=r"step must be an int, got 1\.5"):
        simulate(torch.zeros(2, 5), step=1.5)


def test_what_goes_wrong_in_the_exchange_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is kept until a rank waits, which must not be for ever."""

    def encode(*given: object) -> None:
        raise MemoryError("no room for codes")

    monkeypatch.setattr(LinearCodec, "encode", encode)
    with pytest.raises(MemoryError, match="no room for codes"):
        simulate(torch.ones(3, 10))


def test_seed_and_step_decide() -> None:
    """And nothing else: not the random state, not the layout, not an earlier call."""
    rows = gradient_like(RNG(0), (3, 5000))
    kept = rows.clone()
    mean = simulate(rows, seed=7, step=3)
    torch.manual_seed(99)
    assert torch.equal(mean, simulate(rows, seed=7, step=3))
    assert torch.equal(mean, simulate(rows.t().contiguous().t(), seed=7, step=3))
    assert torch.equal(mean, simulate(rows.clone().requires_grad_(), seed=7, step=3))
    assert torch.equal(rows, kept)
    for other in ({"seed": 8, "step": 3}, {"seed": 7, "step": 4}, {"seed": 3, "step": 7}):
        assert (mean != simulate(rows, **other)).float().mean() > 0.3


def test_public_name() -> None:
    assert hvd_gqsgd.simulate is simulate


WIDE = {"deadline": None, "derandomize": True, "database": None}
TOO_SLOW = [HealthCheck.too_slow]


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """Rows of any type, length and magnitude, and options that suit them."""
    bits = draw(st.integers(2, 16))
    n = draw(st.integers(1, min(9, (2**bits - 1) // 2)))
    numel = draw(st.one_of(st.integers(0, 40), st.sampled_from([1023, 1024, 1025, 2500])))
    dtype = draw(st.sampled_from(DTYPES))
    rng = RNG(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        rows = random_floats(rng, (n, numel), dtype)
    else:
        magnitude = 10 ** draw(st.floats(-45, 38.4))
        rows = torch.from_numpy(rng.uniform(-1, 1, (n, numel)) * magnitude).to(dtype)
    return rows, {
        "bits": bits,
        "exchange": "allreduce",
        "block_size": draw(st.sampled_from([1, 3, 64, 1000, 1024, 1500, None])),
        "correlated": draw(st.booleans()),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "step": draw(st.integers(0, 2**30)),
    }


@pytest.mark.slow
@given(worlds())
@settings(max_examples=400, suppress_health_check=TOO_SLOW, **WIDE)
def test_error_is_less_than_a_level(world: tuple[Tensor, dict[str, Any]]) -> None:
    """Whatever the dither: but for rounding to the type of the gradient."""
    rows, options = world
    rows = torch.where(rows.isfinite(), rows, torch.zeros((), dtype=rows.dtype))
    n = len(rows)
    mean = simulate(rows, **options).double().numpy()
    off = abs(mean - (rows.double() / n).sum(0).numpy())
    step = level(rows, options["bits"], options["block_size"])
    s = reference.levels(options["bits"], n)
    info = torch.finfo(rows.dtype)
    arithmetic = 4 * torch.finfo(torch.float64 if info.bits == 64 else torch.float32).eps
    rounding = step * s * (info.eps + arithmetic) + info.smallest_normal * info.eps
    assert (off <= step + rounding).all()
