"""The dither is as good as random: uniform, and unrelated from place to place.

Statistics are in standard deviations of a normal number. Each of the file's comparisons, of which
there are less than 500, would reject a perfect generator once in 10^9 cases: that makes one false
alarm of the file in two million. Seeds are fixed, so that it passes always or never.

The hash is taken from the reference, which ``test_kernels.py`` holds the native one to, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Array, chi_square_z, encode, norms, threshold

from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference.kinds import linear

LIMIT = threshold(1e-9)
ELEMENTS = 2**19
BLOCKS = [1, 7, 1024, 3000, None]


def dither(numel: int = ELEMENTS, block_size: int | None = 1024, **place: Any) -> Array:
    """The dither of one rank of one, unless told otherwise."""
    defaults = {"seed": 0, "step": 0, "tensor_id": 0, "rank": 0, "world_size": 1}
    return reference.dither(numel, block_size, **(defaults | {"correlated": False} | place))


def unevenness(u: Array) -> float:
    """Of the top 8 bits and, where there is enough, of the top 16 bits."""
    worst = 0.0
    for bits in (8, 16):
        if u.size >= 8 * 2**bits:
            counts = np.bincount(u.ravel() >> np.uint32(32 - bits), minlength=2**bits)
            worst = max(worst, abs(chi_square_z(counts)))
    return worst


def dependence(u: Array, v: Array) -> float:
    """Of two series: their correlation, and how unevenly pairs of their top 4 bits are met with."""
    a, b = u / 2**32 - 0.5, v / 2**32 - 0.5
    correlation = 12 * (a * b).mean() * np.sqrt(a.size)
    pairs = (u >> np.uint32(28)) * np.uint32(16) + (v >> np.uint32(28))
    return max(abs(correlation), abs(chi_square_z(np.bincount(pairs.ravel(), minlength=256))))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_uniform(block_size: int | None, seed: int) -> None:
    assert unevenness(dither(block_size=block_size, seed=seed)) < LIMIT


def test_uniform_over_steps() -> None:
    """One element sees uniform dither too, step after step."""
    u = np.array([dither(16, step=step) for step in range(8192)])
    assert unevenness(u) < LIMIT
    for element in u.T:
        assert unevenness(element) < LIMIT
        assert dependence(element[:-1], element[1:]) < LIMIT


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 16, 52, 64, 256, 512, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("block_size", BLOCKS)
def test_elements_are_unrelated(block_size: int | None, lag: int) -> None:
    """Neighbours, the lanes of a word, and the same place in the next tiles."""
    u = dither(block_size=block_size, seed=3)
    assert dependence(u[:-lag], u[lag:]) < LIMIT


def pairs(u: Array) -> tuple[Array, Array]:
    """The dither of first and of second elements of pairs that share a hash."""
    of_pairs = u.reshape(-1, 2, reference.PAIR)
    return of_pairs[:, 0].ravel(), of_pairs[:, 1].ravel()


def fine_dependence(u: Array, v: Array) -> float:
    """How unevenly pairs of two series' top 8 bits are met with; and these, turned to 8 others."""
    a, b = u >> np.uint32(24), v >> np.uint32(24)
    worst = 0.0
    for other in (b, a ^ b, a + b & np.uint32(255)):
        counts = np.bincount((a * np.uint32(256) + other).ravel(), minlength=2**16)
        worst = max(worst, abs(chi_square_z(counts)))
    return worst


@pytest.mark.parametrize("place", [{}, {"correlated": True, "rank": 1, "world_size": 3}], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_elements_that_share_a_hash_are_unrelated(seed: int, place: dict[str, Any]) -> None:
    """Each element of a pair is uniform, and so are both together, on a lattice of 256 by 256."""
    first, second = pairs(dither(4 * ELEMENTS, seed=seed, **place))
    assert max(unevenness(first), unevenness(second)) < LIMIT
    assert dependence(first, second) < LIMIT
    assert fine_dependence(first, second) < LIMIT
    for lag in (1, reference.PAIR, 512):
        assert dependence(first[lag:], second[:-lag]) < LIMIT
        assert dependence(second[lag:], first[:-lag]) < LIMIT


def test_one_place_of_many_pairs_is_unrelated() -> None:
    """The same over tiles and steps, for each pair of places."""
    u = np.array([dither(2**16, block_size=32, step=step) for step in range(16)]).reshape(-1, 32)
    for place in range(reference.PAIR):
        first, second = u[:, place], u[:, place + reference.PAIR]
        assert max(unevenness(first), unevenness(second)) < LIMIT
        assert dependence(first, second) < LIMIT


A = {"seed": 5, "step": 6, "tensor_id": 7}


@pytest.mark.parametrize(
    "other",
    [
        A | {"seed": 4},
        A | {"seed": -5},
        A | {"seed": 5 + 2**32},
        A | {"step": 7},
        A | {"step": 6 + 2**20},
        A | {"tensor_id": 8},
        A | {"tensor_id": 7 + 2**30},
        {"seed": 6, "step": 5, "tensor_id": 7},
        {"seed": 5, "step": 7, "tensor_id": 6},
        {"seed": 4, "step": 7, "tensor_id": 7},
        A | {"rank": 1, "world_size": 2},
        A | {"rank": 126, "world_size": 127},
        A | {"correlated": True},
        A | {"correlated": True, "tensor_id": 8},
    ],
    ids=str,
)
def test_streams_are_unrelated(other: dict[str, Any]) -> None:
    """Of seeds, steps, tensors and independent ranks; two tiles apart as well as in place."""
    u, v = dither(**A), dither(**other)
    assert dependence(u, v) < LIMIT
    assert dependence(u[:-1], v[1:]) < LIMIT
    assert dependence(u[2048:], v[:-2048]) < LIMIT


@pytest.mark.parametrize("correlated", [False, True])
def test_place_is_all_that_counts(correlated: bool) -> None:
    """Again the same, and a longer tensor begins like a shorter one."""
    u = dither(5000, correlated=correlated, rank=1, world_size=3, **A)
    assert (u == dither(5000, correlated=correlated, rank=1, world_size=3, **A)).all()
    assert (u[:1500] == dither(1500, correlated=correlated, rank=1, world_size=3, **A)).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8, 16, 100])
def test_correlated_ranks_are_stratified(world_size: int) -> None:
    """Around the circle the ranks' dithers follow each other in steps of 1/n, to the last bit."""
    u = np.array(
        [dither(8192, correlated=True, rank=r, world_size=world_size) for r in range(world_size)]
    )
    ordered = np.sort(u, axis=0).astype(np.int64)
    steps = np.diff(ordered, axis=0, append=ordered[:1] + 2**32)
    assert steps.sum(axis=0).tolist() == [2**32] * 8192
    assert set(steps.ravel()) <= {2**32 // world_size, -(-(2**32) // world_size)}


@pytest.mark.parametrize("rank", range(5))
def test_each_correlated_rank_is_uniform(rank: int) -> None:
    """So that a rank is unbiased by itself."""
    u = dither(correlated=True, rank=rank, world_size=5)
    assert unevenness(u) < LIMIT
    assert dependence(u[:-1], u[1:]) < LIMIT


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("fraction", [2**-10, 0.25, 0.5, 0.9])
def test_codes_go_up_as_often_as_they_should(fraction: float, bits: int, correlated: bool) -> None:
    """Through the native kernel: from k + f to k + 1 in a share f of cases."""
    numel = 2**17
    s = reference.levels(bits, 1)
    x = torch.full((numel,), (s // 2 + fraction) / s, dtype=torch.float64)
    x[::1024] = 1
    place = {"rank": 2, "world_size": 3, "correlated": correlated}
    words = encode(x, norms(x, 1024), 1024, linear(bits, s), seed=11, **place)
    codes = reference.unpack(words.numpy(), numel, 1024, bits, s, 1)
    up = codes[x.numpy() < 1] - s // 2
    assert set(up) == {0, 1}
    spread = np.sqrt(fraction * (1 - fraction) / up.size)
    assert abs(up.mean() - fraction) < LIMIT * spread


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"step": 1},
        {"tensor_id": 1},
        {"rank": 1},
        {"lag": 1},
        {"lag": 16},
        {"lag": 1024},
    ],
    ids=str,
)
def test_each_of_them_counts_in_the_native_kernel(other: dict[str, int]) -> None:
    """Half way between levels, codes of two streams are the same as often as two coins."""
    numel, s = 2**14, reference.levels(8, 3)
    x = torch.full((numel,), 0.5 / s, dtype=torch.float64)
    x[::1024] = 1
    place = {"seed": 0, "step": 0, "tensor_id": 0, "rank": 0}

    def codes(**at: int) -> Array:
        code = linear(8, s)
        words = encode(x, norms(x, 1024), 1024, code, world_size=3, correlated=False, **at)
        return reference.unpack(words.numpy(), numel, 1024, 8, s, 1)

    lag = other.get("lag", 0)
    one, two = codes(**place), np.roll(codes(**(place | ({} if lag else other))), lag)
    inner = (x.numpy() < 1) & (np.roll(x.numpy(), lag) < 1)
    same = (one == two)[inner]
    assert abs(same.mean() - 0.5) < LIMIT * 0.5 / np.sqrt(same.size)


# --- the statistics above do reject what is not random -------------------------------------------

COUNTER = np.arange(ELEMENTS, dtype=np.uint32)


@pytest.mark.parametrize(
    "bad",
    [
        lambda i: i,
        lambda i: i << np.uint32(16),
        lambda i: (i % np.uint32(1024)) * np.uint32(2**22),
        lambda i: dither() & np.uint32(0xF0FFFFFF),
        lambda i: dither() | (dither(seed=1) & np.uint32(0x01000000)),
        lambda i: (dither() >> np.uint32(1)) + np.uint32(2**30),
    ],
    ids=["identity", "16 bits of a counter", "place in tile", "4 bits lost", "a bit too often",
         "too narrow"],
)  # fmt: skip
def test_uneven_numbers_are_rejected(bad: Callable[[Array], Array]) -> None:
    assert unevenness(bad(COUNTER)) > LIMIT


@pytest.mark.parametrize(
    "bad",
    [
        lambda i: i * np.uint32(0x9E3779B9),
        lambda i: i << np.uint32(16),
        lambda i: i * np.uint32(1664525) + np.uint32(1013904223),
        lambda i: dither() // np.uint32(2) + np.roll(dither(), 1) // np.uint32(2),
        lambda i: dither()[i // np.uint32(2)],
    ],
    ids=["golden ratio", "16 bits of a counter", "one round of a generator", "moving average",
         "in pairs"],
)  # fmt: skip
def test_related_neighbours_are_rejected(bad: Callable[[Array], Array]) -> None:
    u = bad(COUNTER)
    assert dependence(u[:-1], u[1:]) > LIMIT


@pytest.mark.parametrize(
    "bad",
    [
        lambda u: u,
        lambda u: ~u,
        lambda u: u ^ u << np.uint32(4),
        lambda u: u << np.uint32(6),
        lambda u: u << np.uint32(4) | u >> np.uint32(28),
        lambda u: (u & np.uint32(0xFFFF)) * np.uint32(0x9E37),
    ],
    ids=[
        "the same",
        "its mirror image",
        "4 places on",
        "6 bits down",
        "4 bits round",
        "too narrow",
    ],
)
def test_related_pairs_are_rejected(bad: Callable[[Array], Array]) -> None:
    """Other ways to make a second number of the first one's bits."""
    first, _ = pairs(dither(4 * ELEMENTS))
    second = bad(first)
    assert max(unevenness(second), fine_dependence(first, second)) > LIMIT


def test_related_streams_are_rejected() -> None:
    """The same stream, its mirror image, and one that only differs by a constant."""
    u = dither(**A)
    for v in (u, ~u, u + np.uint32(2**31), u ^ np.uint32(0x12345678)):
        assert dependence(u, v) > LIMIT
