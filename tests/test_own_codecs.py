"""Codecs from outside of the package: registration, what they must be, and the example."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from launch import HERE, mpirun, run
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits, simulate
from hvd_gqsgd.codecs import CODECS, Codec, PlainCodec, register_codec

pytestmark = pytest.mark.launches

EXAMPLE = HERE.parent / "examples" / "new_codec.py"


class Even(PlainCodec):
    """Evenly spaced levels, as linear codes have."""

    def round(self, shares: Tensor, dither: Tensor) -> Tensor:
        return (shares * self.levels + self.levels + dither).floor().long()

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.levels) / self.levels


@pytest.fixture(autouse=True)
def even() -> Iterator[None]:
    register_codec("even", Even)
    yield
    del CODECS["even"]


@pytest.mark.parametrize("options", [
    {"bits": 4}, {"bits": 8, "norm": "l2"}, {"bits": 2, "correlated": False},
    {"bits": 16, "block_size": 1500}, {"bits": 8, "block_size": None},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mean(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Each element within two levels: that of the ranks, and that of the mean."""
    rows = torch.randn(3, 5003, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = simulate(rows, dither="even", **options)
    assert got.dtype == dtype
    if "norm" in options:
        return
    size = options.get("block_size", 1024) or 5003
    norms = rows.float().abs().amax(0)
    norms = torch.cat([part.amax().expand(len(part)) for part in norms.split(size)])
    level = norms / (2 ** (options["bits"] - 1) - 1)
    slack = 0.01 * norms if dtype == torch.bfloat16 else 1e-6
    assert ((got.float() - rows.float().mean(0)).abs() <= 2 * level + slack).all()


def test_errors_and_values_that_are_not_finite() -> None:
    rows = torch.randn(2, 3000)
    rows[1, 5] = torch.nan
    got = simulate(rows, dither="even")
    assert got[:1024].isnan().all()
    assert got[1024:].isfinite().all()
    assert torch.equal(simulate(torch.zeros(2, 100), dither="even"), torch.zeros(100))
    assert simulate(torch.zeros(2, 0), dither="even").shape == (0,)


def test_by_node_and_in_one_phase() -> None:
    """A part of a tensor has the dither of the whole."""
    rows = torch.randn(4, 9000)
    sums = torch.stack([rows[0] + rows[1], rows[2] + rows[3]])
    got = simulate(rows, dither="even", hierarchy="node", nodes=(2, 2))
    assert torch.equal(got, simulate(sums, dither="even") / 2)
    shards = simulate(rows, dither="even", exchange="one_phase")
    torch.testing.assert_close(shards, rows.mean(0), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 3}, "bits must be 2, 4, 8 or 16 for dither='even', got 3"),
        ({"bits": DynamicBits(4)}, "bits must be 2, 4, 8 or 16"),
        ({"bits": BlockBits(4)}, "bits must be 2, 4, 8 or 16"),
        ({"exchange": "allreduce"}, "for dither='even', whose codes cannot be added"),
    ],
    ids=str,
)
def test_options_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        simulate(torch.ones(2, 10), dither="even", **options)


@pytest.mark.parametrize(
    ("name", "codec", "error", "match"),
    [
        (1, Even, TypeError, "must be a string, got 1"),
        ("linear", Even, ValueError, "must not be one of .*, got 'linear'"),
        ("x", int, TypeError, "must be a subclass of Codec"),
        ("x", Codec, TypeError, "must define levels_for"),
        ("x", PlainCodec, TypeError, "must define round, values"),
    ],
    ids=str,
)
def test_registrations_refused(name: Any, codec: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        register_codec(name, codec)
    assert "x" not in CODECS


@pytest.mark.timeout(300)
@pytest.mark.skipif(not EXAMPLE.is_file(), reason="images have no examples")
def test_the_example() -> None:
    job = run([sys.executable, str(EXAMPLE)], limit=240)
    assert job.returncode == 0, job.stdout[-3000:]
    assert "quadratic, 4 bits" in job.stdout
    job = run([*mpirun(2), sys.executable, str(EXAMPLE), "--ranks"], limit=240)
    assert job.returncode == 0, job.stdout[-3000:]
    assert "the same on 2 ranks" in job.stdout
