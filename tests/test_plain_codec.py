"""Codecs from outside: their registration, and all that the package does for one in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits, simulate
from hvd_gqsgd.bench.wire import wire_bytes_of
from hvd_gqsgd.codecs import CODECS, Codec, LinearCodec, PlainCodec, make_codec, register_codec
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class Even(PlainCodec):
    """Levels that are multiples of ``2**(1 - bits)``, from -1 on; 1 itself is cut off."""

    def round(self, shares: Tensor, dither: Tensor) -> Tensor:
        half = 1 << self.bits - 1
        levels = (shares + 1) * half
        up = dither < levels - levels.floor()  # a sum with the dither would be rounded itself
        return (levels.floor().long() + up).clamp(max=2 * half - 1)

    def values(self, codes: Tensor) -> Tensor:
        return codes / (1 << self.bits - 1) - 1


class Nearest(Even):
    """Without chance."""

    def round(self, shares: Tensor, dither: Tensor) -> Tensor:
        return super().round(shares, torch.full_like(dither, 0.5))


@pytest.fixture(autouse=True)
def even() -> Iterator[str]:
    """The codec's name; what a test registers is gone after it."""
    before = dict(CODECS)
    yield register_codec("even", Even)
    CODECS.clear()
    CODECS.update(before)


def test_names_are_values_of_the_option(even: str) -> None:
    assert even == "even"
    assert Options(dither=even, bits=4).exchange_for(2) == "two_phase"
    assert Options(dither=even, bits=4).describe(2) == "two_phase on 2 ranks, levels per side: 7"
    with pytest.raises(ValueError, match=r"one of \('linear', 'exponential', 'even'\), got 'odd'"):
        Options(dither="odd")
    digests = {Options(dither=dither, bits=4).digest() for dither in (even, "linear")}
    register_codec("odd", Even)
    assert len(digests | {Options(dither="odd", bits=4).digest()}) == 3


def test_a_name_can_be_registered_again(even: str) -> None:
    """As a cell of a notebook is run again; but not one that native code knows."""
    register_codec(even, Nearest)
    assert CODECS[even] is Nearest
    for name in ("linear", "exponential"):
        with pytest.raises(ValueError, match=f"must not be one of .*, got '{name}'"):
            register_codec(name, Nearest)


class Unfinished(PlainCodec):
    def values(self, codes: Tensor) -> Tensor:
        return codes


@pytest.mark.parametrize(
    ("name", "codec", "message"),
    [
        (3, Even, "the name of a codec must be a string, got 3"),
        ("x", Even(4, 7, None, True, 0, 0, 1), "codec must be a subclass of Codec, got Even"),
        ("x", dict, "codec must be a subclass of Codec, got <class 'dict'>"),
        ("x", Unfinished, "codec Unfinished must define round"),
        ("x", Codec, "codec Codec must define levels_for"),
    ],
)
def test_what_is_no_codec_is_refused(name: Any, codec: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register_codec(name, codec)
    assert name not in CODECS


@pytest.mark.parametrize("bits", [5, DynamicBits(4), BlockBits(4)], ids=str)
def test_widths(even: str, bits: Any) -> None:
    with pytest.raises(ValueError, match="bits must be 2, 4, 8 or 16 for dither='even', got "):
        Options(dither=even, bits=bits)
    register_codec("narrow", type("Narrow", (Even,), {"widths": (5,)}))
    if bits == 5:
        rows = torch.randn(3, 5000)
        mean = simulate(rows, dither="narrow", bits=5)
        assert (mean - rows.mean(0)).abs().max() < 2 * rows.abs().max() / 8
    else:
        with pytest.raises(ValueError, match="bits must be 5 for dither='narrow', got "):
            Options(dither="narrow", bits=bits)


def test_codes_are_not_added(even: str) -> None:
    with pytest.raises(ValueError, match="dither='even', whose codes cannot be added"):
        Options(dither=even, exchange="allreduce")
    codec = make_codec(Options(dither=even), 8, summands=1, rank=0, world_size=2)
    nothing = torch.empty(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="codes of Even cannot be added"):
        codec.decode(nothing, nothing, [], [], [], 2, 0.5)


def test_linear_codec_with_other_levels() -> None:
    """A subclass of a native codec goes through native code, and can be added."""
    register_codec("ternary", type("Ternary", (LinearCodec,), {"levels_for": lambda *_: 1}))
    rows = torch.tensor([[1.0, -1, 0, 0.5]]).repeat(3, 1)
    mean = simulate(rows, dither="ternary", bits=8, exchange="allreduce", correlated=False)
    assert mean[:3].tolist() == [1, -1, 0]
    assert (mean[3] * 3).item() == pytest.approx(round(mean[3].item() * 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("exchange", ["two_phase", "one_phase"])
def test_levels_are_met(even: str, bits: int, exchange: str, dtype: torch.dtype) -> None:
    """All of a message is in its place: gradients on the grid come out as they are."""
    places = min(bits, 8) - 1  # what a bfloat16 holds
    for block_size in (1, 5, 1000, 1024, 1500, None):
        for numel in (0, 1, 3000):
            row = torch.randint(-(2**places), 2**places, (numel,)).to(dtype) / 2**places
            row[:: min(block_size or 400, 400)] = -1  # the norm of every tile
            options = {"dither": even, "bits": bits, "block_size": block_size}
            mean = simulate(row.repeat(3, 1), exchange=exchange, **options)
            torch.testing.assert_close(mean, row)  # a third of three times a number


def test_by_node(even: str) -> None:
    """A part of a tensor has the dither of the whole."""
    rows = torch.randn(4, 9000)
    sums = torch.stack([rows[0] + rows[1], rows[2] + rows[3]])
    got = simulate(rows, dither=even, hierarchy="node", nodes=(2, 2))
    assert torch.equal(got, simulate(sums, dither=even) / 2)


def test_unbiased(even: str) -> None:
    """The average over steps comes closer; without chance, it does not."""
    register_codec("nearest", Nearest)
    rows = torch.rand(3, 3000, generator=torch.Generator().manual_seed(0)) - 0.9

    def error(dither: str, correlated: bool, steps: int, exchange: str = "two_phase") -> float:
        options = {"dither": dither, "bits": 4, "correlated": correlated, "exchange": exchange}
        means = [simulate(rows, step=step, **options) for step in range(steps)]
        return float((torch.stack(means).mean(0) - rows.mean(0)).norm())

    for correlated in (True, False):
        assert error(even, correlated, 64) < 0.15 * error(even, correlated, 1)
        assert error("nearest", correlated, 64) > 0.9 * error("nearest", correlated, 1)
    assert error(even, True, 1, "one_phase") < 0.95 * error(even, False, 1, "one_phase")


@pytest.mark.parametrize("options", [{}, {"norm": "l2"}, {"nodes": (2, 2)}], ids=str)
def test_not_finite(even: str, options: dict[str, Any]) -> None:
    """A block without a finite norm is NaN, and no other one."""
    rows = torch.ones(4, 300)
    rows[0, 7], rows[1, 150] = torch.nan, torch.inf
    mean = simulate(rows, dither=even, bits=4, block_size=100, **options)
    assert mean[:200].isnan().all()
    assert mean[200:].isfinite().all()


def test_bytes_are_those_of_linear_codes(even: str) -> None:
    gradients = [[("a", torch.randn(5000)), ("b", torch.randn(4100))] for _ in range(3)]
    options = Options(dither=even, bits=4)
    ranks = SimulatedRanks(3, options)
    ranks.means(gradients)
    linear = SimulatedRanks(3, Options(bits=4, exchange="two_phase"))
    linear.means(gradients)
    on_wire = ranks.stats.compressed_bytes_on_wire
    assert on_wire == linear.stats.compressed_bytes_on_wire
    assert on_wire == pytest.approx(wire_bytes_of(options, [5000, 4100], 3), abs=64)
