"""THEORY.md: what it says of errors and bytes is what is measured.

Each comparison for bias, of which there are 22, would reject an unbiased operator once in 10^9
cases: that makes one false alarm of the file in 45 million. Ratios of mean squares have to be right
to 0.1; over other seeds their standard deviation is 0.01 at most, so a false alarm takes ten of
them. Seeds are fixed, so that the file passes always or never.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import theory
import torch
from helpers import DTYPES, Array, as_numpy, gradient_like, random_floats, threshold
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from theory import Operator
from torch import Tensor

from hvd_gqsgd import simulate
from hvd_gqsgd.bench import error
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference import two_phase as reference_two_phase
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.simulated import SimulatedWorld

LIMIT = threshold(1e-9)
RNG = np.random.default_rng

ALLREDUCE = [
    Operator(exchange="allreduce", **options)
    for options in (
        {}, {"correlated": False}, {"block_size": None}, {"block_size": 256}, {"norm": "l2"},
        {"correlated": False, "block_size": None}, {"bits": 4}, {"bits": 12}, {"bits": 16},
    )
]  # fmt: skip
TWO_PHASE = [
    *(Operator(**options) for options in ({}, {"correlated": False}, {"norm": "l2"}, {"bits": 4})),
    *(
        Operator(dither="exponential", **options)
        for options in (
            {}, {"correlated": False}, {"block_size": None}, {"norm": "l2"}, {"bits": 4},
        )
    ),
]  # fmt: skip
ONE_PHASE = [
    Operator(exchange="one_phase", **options)
    for options in (
        {}, {"correlated": False}, {"bits": 4, "norm": "l2"}, {"dither": "exponential"},
        {"dither": "exponential", "correlated": False, "block_size": None},
    )
]  # fmt: skip


def heavy_tailed(rng: np.random.Generator, n: int, numel: int) -> Tensor:
    """Student's t with 4 degrees of freedom."""
    return torch.from_numpy(rng.standard_t(4, (n, numel)).astype(np.float32))


def mean_square(rows: Tensor, steps: int, operator: Operator, **options: Any) -> Array:
    """Of each element's error over so many steps."""
    exact = rows.double().mean(0)
    errors = [simulate(rows, step=k, **operator._asdict(), **options) - exact for k in range(steps)]
    return np.mean([error.numpy() ** 2 for error in errors], axis=0)


# --- mean squares --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 7, 16])
def test_errors_are_below_their_bounds_and_as_expected(n: int) -> None:
    rows = heavy_tailed(RNG(n), n, 2**15)
    for operator in [*ALLREDUCE, *TWO_PHASE, *ONE_PHASE]:
        if operator.exchange == "allreduce" and operator.levels(n) < 1:
            continue
        measured = mean_square(rows, 4, operator).mean()
        bound = theory.variance_bound(rows.numpy(), operator).mean()
        assert 0.01 < measured / bound < 1, operator
        if operator.exchange == "allreduce":
            expected = theory.expected_variance(rows.numpy(), operator).mean()
            assert measured == pytest.approx(expected, rel=0.1), operator


def equalities(n: int, rng: np.random.Generator) -> Iterator[tuple[str, Operator, Any, float]]:
    """Where the page says "with equality": the operator, x / M of each rank, and the mean square
    over M^2. Shares are the same for all elements, or of shape (ranks, elements)."""
    summed, alone = Operator(exchange="allreduce"), Operator(exchange="allreduce", correlated=False)
    s, uniform = (2**8 - 1) // (2 * n), rng.uniform(-1, 1, (n, 2**15))
    yield "1: half way", alone, [0.5 / s] * n, 1 / (4 * n * s**2)
    yield "1: uniform", alone, uniform, 1 / (6 * n * s**2)
    yield "2: uniform", summed, uniform, (n + 1) / (12 * n**2 * s**2)
    yield "2: equal ranks", summed, [0.5 / (n * s)] * n, 1 / (4 * n**2 * s**2)
    worst = [(0.5 - r) / n % 1 / s for r in range(n)]
    yield "2: worst data", summed, worst, (1 / 12 + 1 / (6 * n**2)) / s**2
    # Half a level of a norm that the elements are a part of: n ranks, with 1 and 1023 of them each.
    s = (2**16 - 1) // (2 * n)
    squared = n / (1 - n * 1023 * (0.5 / s) ** 2)
    yield "3: half way", alone._replace(bits=16, norm="l2"), [0.5 * squared**0.5 / s] * n, (
        squared / (4 * n * s**2)
    )  # fmt: skip
    yield "5: linear", Operator(), [3 / 127, 4 / 127], 1 / (4 * 127**2)  # R = 1: the mean is M once
    exponential = Operator(dither="exponential")
    yield "5: exponential", exponential, [2**-4, 2**-4, 2**-3], (4 / 3 * 2**-4) ** 2 / 8
    yield "5: below all levels", exponential._replace(bits=4), [0, 2**-6], 2.0**-14


@pytest.mark.parametrize("n", [2, 3, 4, 7, 16])
def test_bounds_are_reached(n: int) -> None:
    """By the data of which the page says so."""
    for name, operator, shares, expected in equalities(n, RNG(n)):
        rows = torch.as_tensor(shares, dtype=torch.float64)
        rows = rows.view(len(rows), -1).expand(-1, 2**15).contiguous()
        first = torch.arange(2**15) % 1024 == 0
        rows[:, first] = 1  # M, which is exact
        measured = mean_square(rows, 4, operator)[~first.numpy()].mean()
        assert measured == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8])
def test_no_data_is_worse_for_correlated_dither(n: int) -> None:
    """Than that of which the page proves it: against random fractions, and against their like."""
    rng, bound = RNG(n), 1 / 12 + 1 / (6 * n**2)
    random = rng.uniform(0, 1, (n, 20_000))
    worst = ((0.5 - np.arange(n)) / n % 1)[:, None]
    near = (worst + rng.normal(0, 0.1, (n, 20_000))) % 1
    for fractions in (random, near, worst):
        variance = theory.rounding_variance(fractions, correlated=True) / n**2
        assert (variance > -1e-12).all() and (variance < bound + 1e-12).all()
    assert variance == pytest.approx(bound)


def test_default_against_the_authors_scheme() -> None:
    """On a bucket of 25 MB the error is less than a fifth."""
    rows = heavy_tailed(RNG(0), 4, 25 * 2**20 // 4)
    exact = rows.mean(0)
    authors = (simulate(rows, block_size=None, correlated=False) - exact).norm()
    default = (simulate(rows) - exact).norm()
    assert authors / default >= 5


# --- the benchmark's tables ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The benchmark, with less data."""
    result: dict[str, Any] = error.measure(ranks=4, numel=2**15, trials=4)
    return result


@pytest.mark.slow
def test_the_tables_agree_with_theory(measured: dict[str, Any]) -> None:
    rows = measured["comparison"] + measured["operators"]
    assert len(rows) == len(error.COMPARISON) + len(error.OPERATORS)
    for row in rows:
        assert 0.05 < row["to_bound"] < 1, row
        if row["to_expected"] is not None:
            assert row["to_expected"] == pytest.approx(1, abs=0.1), row
    assert len(measured["tight"]) == 9
    for case in measured["tight"]:
        assert case["to_formula"] == pytest.approx(1, abs=0.1), case
    for row in measured["by_ranks"]:
        assert row["allreduce_levels"] == 255 // (2 * row["ranks"])
        assert row["two_phase_levels"] == 127
        assert row["two_phase_different"] < row["allreduce_different"]


@pytest.mark.parametrize("n", [2, 3, 16])
def test_the_benchmarks_formulas_are_those_of_theory(n: int) -> None:
    rows = heavy_tailed(RNG(n), n, 3000)
    for operator in [*ALLREDUCE, *TWO_PHASE]:
        if operator.exchange == "allreduce" and operator.levels(n) < 1:
            continue
        bound = error.variance_bound(rows, **operator._asdict()).numpy()
        np.testing.assert_allclose(bound, theory.variance_bound(rows.numpy(), operator), rtol=1e-9)
        if operator.exchange == "allreduce":
            variance = error.expected_variance(rows, **operator._asdict()).numpy()
            expected = theory.expected_variance(rows.numpy(), operator)
            np.testing.assert_allclose(variance, expected, rtol=1e-6, atol=1e-9 * bound.max())


@pytest.mark.slow
def test_the_tables_can_be_printed(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(error, "measure", lambda *args: measured)
    error.main(["--json"])
    assert json.loads(capsys.readouterr().out) == measured
    for form in ([], ["--markdown"]):
        error.main(form)
        assert "One tensor of 32,768 float32" in capsys.readouterr().out
    for wrong in (["--ranks", "1"], ["--ranks", "128"], ["--trials", "0"], ["--numel", "0"]):
        with pytest.raises(SystemExit):
            error.main(wrong)
        assert "got" in capsys.readouterr().err


# --- bytes ---------------------------------------------------------------------------------------


def exchanged(rows: list[Tensor], operator: Operator) -> list[Stats]:
    """The counts of ranks that exchange a bucket of tensors; each has a row for each rank."""
    world, options = SimulatedWorld(len(rows[0])), Options(**operator._asdict())
    ranks = [Pipeline(options, world.transport(r)) for r in range(world.size)]
    tickets = [rank.submit(row) for tensor in rows for rank, row in zip(ranks, tensor, strict=True)]
    for rank in ranks:
        rank.flush()
    ready = [False]
    while not all(ready):
        ready = [rank.advance() for rank in ranks]
    assert all(rank.active for rank in ranks) and tickets
    return [rank.stats for rank in ranks]


NUMELS = [0, 1, 7, 1000, 1024, 1025, 5000]


@pytest.mark.parametrize("exchange", ["allreduce", "two_phase"])
@pytest.mark.parametrize("bits", [3, 4, 7, 8, 11, 16])
def test_bytes(bits: int, exchange: Any) -> None:
    """The formula of the page, on every rank."""
    codes = ["linear", "exponential"] if exchange == "two_phase" and bits in (4, 8) else ["linear"]
    for dither, block_size, double, norm, n in itertools.product(
        codes, [1, 100, 1024, 1500, None], [False, True], ["max", "l2"], [2, 3]
    ):
        operator = Operator(bits, dither, exchange, norm, block_size)
        dtype = torch.float64 if double else torch.float32
        rows = [torch.ones(n, numel, dtype=dtype) for numel in NUMELS]
        expected = theory.wire_bytes(NUMELS, operator, n, double)
        for stats in exchanged(rows, operator):
            assert stats.compressed_bytes_on_wire == expected, operator
        assert expected == error.wire_bytes(
            NUMELS, bits=bits, block_size=block_size, two_phase=exchange == "two_phase",
            l2=norm == "l2", double=double, ranks=n,
        )  # fmt: skip


def test_bytes_of_the_example() -> None:
    """The numbers that the page works out."""
    summed = Operator(exchange="allreduce")
    assert theory.wire_bytes([10**6], summed, 4) == 4 * (16 + 977) + 4 * (16 + 250_000) == 1_004_036
    assert theory.wire_bytes([10**6], summed._replace(norm="l2"), 4) == 1_004_036 + 8 * 977
    assert theory.wire_bytes([10**6], Operator(), 4) == 3972 + 500_000 + 501_962


# --- bias ----------------------------------------------------------------------------------------

OPERATORS = [
    *(
        Operator(exchange="allreduce", **options)
        for options in (
            {}, {"correlated": False}, {"bits": 3, "norm": "l2", "block_size": 100},
            {"bits": 16, "norm": "l2"},
        )
    ),
    *(Operator(**options) for options in ({}, {"bits": 3, "correlated": False}, {"norm": "l2"})),
    *(
        Operator(dither="exponential", **options)
        for options in ({}, {"correlated": False, "block_size": None}, {"bits": 4}, {"norm": "l2"})
    ),
    *ONE_PHASE,
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_unbiased(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of steps, added up in two directions, average out: a t-test over 64 steps.

    Rounding to the nearest level, before whatever else is random, fails the same test.
    """
    rows, options = gradient_like(RNG(5), (3, 1024)), operator._asdict()
    exact = rows.double().mean(0).numpy()
    fair = np.stack([simulate(rows, step=k, **options).double().numpy() for k in range(64)]) - exact
    biased = np.stack(list(to_nearest(rows, operator, monkeypatch))) - exact
    direction = np.sign(biased.mean(0))

    assert t_test(fair @ direction) < LIMIT
    assert t_test(fair @ np.sign(exact)) < LIMIT
    assert t_test(biased @ direction) > LIMIT


def to_nearest(
    rows: Tensor, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Array]:
    """What 64 steps would decode if each rank rounded to nearest."""

    def half(numel: int, *args: Any, **at: Any) -> Array:
        return np.full(numel, 2**31, np.uint32)

    monkeypatch.setattr(reference, "dither", half)
    monkeypatch.setattr(reference_two_phase, "dither_of_rank", half)
    at = {"bits": operator.bits, "block_size": operator.block_size, "norm": operator.norm,
          "correlated": operator.correlated, "seed": 0, "tensor_id": 0}  # fmt: skip
    for step in range(64):
        if operator.exchange == "allreduce":
            yield reference.mean(rows.numpy(), step=step, **at)
        elif operator.exchange == "one_phase":
            shards = np.array_split(rows.numpy(), range(342, 1024, 342), axis=1)
            yield np.concatenate(
                [
                    reference_two_phase.one_phase_mean(x, step=step, dither=operator.dither, **at)
                    for x in shards
                ]
            )
        else:
            yield reference_two_phase.two_phase_mean(
                rows.numpy(), step=step, dither=operator.dither, **at
            )


def t_test(values: Array) -> float:
    """How far their mean is from 0, as a normal number (Wallace, Ann. Math. Stat. 30, 1959)."""
    freedom = len(values) - 1
    if values.std() == 0:
        return math.inf if values[0] else 0.0
    t = values.mean() / (values.std(ddof=1) / math.sqrt(len(values)))
    return (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(t**2 / freedom))


# --- what no error exceeds -----------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Tensor, Operator, dict[str, int]]:
    """Rows of any type and magnitude, any operator, and a seed and a step."""
    n = draw(st.integers(1, 16))
    numel = draw(st.one_of(st.integers(0, 40), st.sampled_from([1023, 1024, 1025, 2500])))
    any_way = [Operator(dither=dither, exchange=exchange) for dither in ("linear", "exponential")
               for exchange in ("one_phase", "two_phase")]  # fmt: skip
    operator = draw(st.sampled_from([Operator(exchange="allreduce"), *any_way]))
    widths = {"allreduce": st.integers((2 * n).bit_length(), 16),
              "two_phase": st.integers(2, 16), "one_phase": st.integers(2, 16)}  # fmt: skip
    exponential = operator.dither == "exponential"
    operator = operator._replace(
        bits=draw(st.sampled_from([4, 8]) if exponential else widths[operator.exchange]),
        norm=draw(st.sampled_from(["max", "l2"])),
        block_size=draw(st.sampled_from([1, 3, 64, 1000, 1024, 1500, None])),
        correlated=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(DTYPES))
    rng = RNG(draw(st.integers(0, 2**32)))
    most = min(torch.finfo(dtype).max * 0.9, 1e38)
    if draw(st.booleans()):
        rows = random_floats(rng, (n, numel), dtype)
        rows = torch.where(rows.abs() < most, rows, torch.zeros((), dtype=dtype))
    else:
        magnitude = min(10 ** draw(st.floats(-45, 38)), most)
        rows = torch.from_numpy(rng.uniform(-1, 1, (n, numel)) * magnitude).to(dtype)
    at = {
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "step": draw(st.integers(0, 2**30)),
    }
    return rows, operator, at


@pytest.mark.slow
@given(worlds())
@settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
def test_no_error_exceeds_its_sure_bound(world: tuple[Tensor, Operator, dict[str, int]]) -> None:
    """One level in an Allreduce, one of each phase, or the gaps between exponential levels."""
    rows, operator, at = world
    mean = simulate(rows, **operator._asdict(), **at)
    bound = torch.from_numpy(theory.sure_bound(as_numpy(rows), operator))
    exact = (rows.double() / len(rows)).sum(0)

    info = torch.finfo(rows.dtype)
    # A level above the largest float, which only an L2 norm can have, is infinite.
    could_overflow = (exact.abs() + bound) * (1 + info.eps) > info.max
    finite = mean.isfinite()
    assert (finite | could_overflow).all()
    if operator.norm == "max":
        assert finite.all()

    exponential = operator.dither == "exponential"
    wide = info.bits == 64 and not exponential
    arithmetic = (8 + len(rows)) * torch.finfo(torch.float64 if wide else torch.float32).eps
    norm = torch.from_numpy(operator.norms(as_numpy(rows)))
    largest = exact.abs() + bound if exponential else norm
    rounding = largest * (info.eps + arithmetic) + 2 * info.smallest_normal * info.eps
    assert ((mean.double() - exact).abs() <= bound + rounding)[finite].all()
