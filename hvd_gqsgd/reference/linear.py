"""Linear dithering in plain NumPy, slow and simple: the bits that the native kernels must give.

n ranks hold gradients x_1, ..., x_n. A gradient is cut in blocks; M is the largest magnitude in a
block over all ranks, s the number of levels a side, and xi is uniform on [0, 1):

    code    c_r = floor(x_r s / M + xi_r)       -s <= c_r <= s,  E[c_r] = x_r s / M
    mean    (c_1 + ... + c_n) M / (s n)         unbiased, as each code is

That is the standard dithering of Global-QSGD (Xin, Canini, Richtárik, Horváth: "Quantize Once,
Train Fast", arXiv 2305.18627) with one norm a block, the maximum norm or, in the place of M, the L2
norm of the block over all ranks. Dither is independent
between ranks or correlated (Suresh, Sun, Ro, Yu: "Correlated Quantization for Distributed Mean
Estimation and Optimization", ICML 2022, arXiv 2203.04925), and either way a hash of the element's
place. Exponential dithering and the two-phase exchange stand in ``two_phase.py``.

Arithmetic is in float32, for float64 gradients in float64, one rounding an operation. NumPy has no
bfloat16: its bit patterns stand in for it, so a ``uint16`` array is a bfloat16 tensor. A
``block_size`` of None is one block for the whole tensor. Norms are bits of floats, as integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "codes",
    "decode",
    "dither",
    "dither_stream",
    "floats",
    "hash_bits",
    "l2_norms",
    "levels",
    "mean",
    "mix64",
    "narrow",
    "norms",
    "pack",
    "places",
    "rounded",
    "shared_norms",
    "shares",
    "squares",
    "tile_keys",
    "unpack",
    "widen",
    "word_type",
]

Array = NDArray[Any]

TILE = 1024  # elements that are packed together
PAIR = 16  # how far apart elements lie that share a hash
ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio


def levels(bits: int, world_size: int) -> int:
    """s, such that n codes from 0 to 2s add up to less than 2^bits."""
    return ((1 << bits) - 1) // (2 * world_size)


class Places(NamedTuple):
    """Where each element lies."""

    block: Array
    tile: Array  # counted through the whole tensor
    position: Array  # in the tile
    word: Array
    lane: Array


def places(numel: int, block_size: int | None, bits: int) -> Places:
    """Blocks are cut in tiles of at most 1024 elements. A tile of m elements fills w = ceil(m / L)
    words of L lanes, lane by lane: lane l of its word j holds its element l w + j.
    """
    size = block_size or max(numel, 1)
    block, within = np.divmod(np.arange(numel), size)
    tile = block * -(-size // TILE) + within // TILE
    position = within % TILE
    words = -(-np.bincount(tile) // lanes_of(bits))  # of each tile
    lane, word = np.divmod(position, words[tile])
    return Places(block, tile, position, (np.cumsum(words) - words)[tile] + word, lane)


def norms(x: Array, block_size: int | None) -> Array:
    """Largest magnitude of each block, as the bits of a float32 (of a float64 for float64).

    Such bits order as the numbers do, with infinity above them and NaN on top.
    """
    bits, size = _magnitudes(x), block_size or max(x.size, 1)
    return np.array([bits[i : i + size].max() for i in range(0, x.size, size)], bits.dtype)


def places_of_largest(x: Array, block_size: int) -> Array:
    """The place in its block of the first element with the largest magnitude, as ``int64``."""
    bits = _magnitudes(x)
    starts = range(0, x.size, block_size)
    return np.array([bits[i : i + block_size].argmax() for i in starts], np.int64)


def _magnitudes(x: Array) -> Array:
    """The bits of the magnitudes; see ``norms``."""
    if x.dtype == np.float16:
        half = x.view(np.uint16) & np.uint16(0x7FFF)
        number = half.view(np.float16).astype(np.float32).view(np.int32)
        beyond = 0x7F800000 + ((half.astype(np.int32) - 0x7C00) << 13)  # a NaN keeps its payload
        bits = np.where(half < 0x7C00, number, beyond.astype(np.int32))
    elif x.dtype == np.float64:
        bits = x.view(np.int64) & np.int64(2**63 - 1)
    else:
        bits = widen(x).view(np.int32) & np.int32(2**31 - 1)
    return bits


def squares(x: Array, norms: Array, block_size: int | None) -> Array:
    """The sum of (x / M)^2 of each block in units of 2^-30 (``int64``), the norm p = q = 2 of
    Global-QSGD. x / M is rounded to the nearest multiple of 2^-15; 0 where M is not finite.
    """
    half = np.full(x.size, 2**31, np.uint32)
    c = codes(x, norms, block_size, 2**15, half, 17)
    sums = np.zeros(norms.size, np.int64)
    np.add.at(sums, places(x.size, block_size, 8).block, c * c)
    return sums


def l2_norms(norms: Array, squares: Array) -> Array:
    """M sqrt(sum of (x / M)^2) from both over all ranks: from M to the largest finite number."""
    maxima = floats(norms)
    real = maxima.dtype.type
    factor = np.sqrt(np.maximum(squares, 0).astype(real)) / real(2**15)  # none is negative
    with np.errstate(over="ignore", invalid="ignore"):
        l2 = np.minimum(maxima * np.maximum(factor, real(1)), np.finfo(real).max)
    return np.where(np.isfinite(maxima), l2.view(norms.dtype), norms)


def dither(
    numel: int, block_size: int | None, *, seed: int, step: int, tensor_id: int,
    rank: int, world_size: int, correlated: bool,
) -> Array:  # fmt: skip
    """xi of each element, in units of 2^-32 (``uint32``).

    Independent: a hash of seed, step, tensor, element and rank. Correlated: xi_r = frac(U + r / n)
    with U a hash of all but the rank. In the paper xi_r = pi_r / n + gamma_r, with pi a random
    permutation and gamma_r uniform on [0, 1 / n). Here pi is a rotation and gamma the same for all
    ranks, and U is both in one number.
    """
    stream = 0 if correlated else 1 + rank
    xi = dither_stream(numel, block_size, seed=seed, step=step, tensor_id=tensor_id, stream=stream)
    return xi + np.uint32(rank * 2**32 // world_size if correlated else 0)  # modulo 2^32


def dither_stream(
    numel: int, block_size: int | None, *, seed: int, step: int, tensor_id: int, stream: int
) -> Array:
    """32 random bits for each element: a hash of all these and of the element's place.

    Two elements 16 apart share one hash. Where the first one has the halves (h, l), the second one
    has (h ^ l, l), so that the upper halves of both are independent.
    """
    at = places(numel, block_size, 8)
    tiles = int(at.tile.max(initial=-1)) + 1
    keys = tile_keys(tiles, seed=seed, step=step, tensor_id=tensor_id, stream=stream)
    shared = hash_bits(keys[at.tile], at.position & ~PAIR)
    return np.where(at.position & PAIR, shared ^ shared << np.uint32(16), shared)


def tile_keys(tiles: int, *, seed: int, step: int, tensor_id: int, stream: int) -> Array:
    """What all dither of each tile is drawn from (``uint64``)."""
    key = mix64(seed + ODD)
    key = mix64(key ^ (step + ODD) % 2**64)
    first, number = divmod(tensor_id, 2**31)  # the first tile of a part of a tensor is above
    key = mix64(key ^ (number + 2 * ODD) % 2**64)
    key = mix64(key ^ (stream + 3 * ODD) % 2**64)
    return np.array([mix64((key + first + t) % 2**64) for t in range(tiles)], np.uint64)


def hash_bits(keys: Array, index: Array) -> Array:
    """32 random bits for each pair of a key and an index (``uint32``)."""
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    x = index.astype(np.uint32) + low  # this, and what follows, modulo 2^32
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= (x >> np.uint32(15)) ^ high
    x *= np.uint32(0x846CA68B)
    return x


def shares(values: Array, maxima: Array, one: int) -> Array:
    """x * one / M of each element, cut off at +-one; 0 where M is 0 or not finite.

    ``one`` / M is rounded so that M gives ``one`` at least.
    """
    real = values.dtype.type
    usable = np.isfinite(maxima) & (maxima > 0)
    most = np.where(usable, maxima, real(1))
    guard = real(2.0**512 if real is np.float64 else 2.0**64)
    # A power of two that keeps one / M away from both ends of the floats.
    least = real(1) / guard  # of this type with NumPy 1 too, where 1 / guard is a float64
    pre = np.where(maxima < least, guard, np.where(most > guard, least, real(1)))
    scale = real(one) / (most * pre)
    short = most * pre * scale < real(one)
    scale = np.where(short, np.nextafter(scale, real(np.inf)), scale)
    scale = np.where(usable, scale, real(0))

    with np.errstate(over="ignore", invalid="ignore"):  # from values beyond their norm
        share = np.clip((values * pre) * scale, real(-one), real(one))
    share = np.where(np.isnan(share), real(-one), share)
    out: Array = np.where(np.isfinite(maxima), share, real(0))
    return out


def codes(x: Array, norms: Array, block_size: int | None, s: int, xi: Array, bits: int) -> Array:
    """floor(x s / M + xi), with x s / M and xi cut to f binary places; 0 where M is not finite.

    f is as large as an int32 allows beside the levels that lanes of this width have. x s / M is cut
    towards zero, so that zero stays zero, and s / M is rounded so that M gives s, whatever xi.
    """
    f = 32 - bits
    maxima = floats(norms)[places(x.size, block_size, 8).block]
    fixed = shares(widen(x), maxima, s * 2**f).astype(np.int64)  # towards zero
    return (fixed + (xi >> np.uint32(32 - f)).astype(np.int64)) // (1 << f)


def pack(c: Array, block_size: int | None, bits: int, s: int) -> Array:
    """Words: c + s in lanes of ``bits`` bits, but the bare c in the top lane, which has the sign.

    Adding the words of n ranks adds their codes, and no lane and no word can overflow. Lanes behind
    the last element hold the code 0. Codes that are not added have no bias: for them s is 0 here.
    """
    at, lanes = places(c.size, block_size, bits), lanes_of(bits)
    digits = np.zeros((at.word.max(initial=-1) + 1, lanes), np.int64)
    digits[at.word, at.lane] = c
    digits[:, :-1] += s
    words: Array = digits @ 2 ** (bits * np.arange(lanes))
    return words.astype(word_type(bits))


def unpack(
    words: Array, numel: int, block_size: int | None, bits: int, s: int, contributors: int
) -> Array:
    """The sum of the codes of each element, from the sum of the words of so many ranks."""
    at = places(numel, block_size, bits)
    digit: Array = words.astype(np.int64)[at.word] // 2 ** (bits * at.lane)
    top = at.lane == lanes_of(bits) - 1
    return np.where(top, digit, digit % (1 << bits) - contributors * s)


def decode(
    sums: Array, norms: Array, block_size: int | None, s: int, scale: float, dtype: Any
) -> Array:
    """scale * sum * M / s, rounded to nearest with ties to even; NaN where M is not finite."""
    maxima = floats(norms)[places(sums.size, block_size, 8).block]
    real = maxima.dtype.type
    with np.errstate(over="ignore", invalid="ignore"):
        out = (sums.astype(real) * real(scale / s)) * maxima
    return narrow(np.where(np.isfinite(maxima), out, real(np.nan)), dtype)


def narrow(out: Array, dtype: Any) -> Array:
    """Numbers as elements of a tensor, rounded to nearest with ties to even."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.dtype(dtype) != np.uint16:
            return out.astype(np.dtype(dtype))
    bits = out.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(out), np.uint16(0x7FC0), rounded.astype(np.uint16))


def shared_norms(rows: Array, block_size: int | None, norm: str) -> Array:
    """What ranks with one row each agree on: "max" or "l2" norms of blocks."""
    largest: Array = np.max([norms(x, block_size) for x in rows], axis=0)
    if norm == "max":
        return largest
    total: Array = np.sum([squares(x, largest, block_size) for x in rows], axis=0)
    return l2_norms(largest, total)


def mean(
    rows: Array, *, bits: int, block_size: int | None, correlated: bool, seed: int, step: int,
    tensor_id: int, norm: str = "max",
) -> Array:  # fmt: skip
    """The whole of it: what n ranks, with one row each, decode."""
    n, numel = rows.shape
    s = levels(bits, n)
    shared = shared_norms(rows, block_size, norm)
    total: Array | int = 0
    for rank, x in enumerate(rows):
        xi = dither(
            numel, block_size, seed=seed, step=step, tensor_id=tensor_id,
            rank=rank, world_size=n, correlated=correlated,
        )  # fmt: skip
        total = total + pack(codes(x, shared, block_size, s, xi, bits), block_size, bits, s)
    sums = unpack(np.asarray(total), numel, block_size, bits, s, n)
    return decode(sums, shared, block_size, s, 1 / n, rows.dtype)


def rounded(
    x: Array, *, bits: int, block_size: int | None, seed: int, step: int, tensor_id: int, rank: int
) -> Array:
    """A rank's tensor as all ranks gather it: on its own norms, with independent dither."""
    s, own = levels(bits, 1), norms(x, block_size)
    xi = dither(
        x.size, block_size, seed=seed, step=step, tensor_id=tensor_id,
        rank=rank, world_size=1, correlated=False,
    )  # fmt: skip
    return decode(codes(x, own, block_size, s, xi, bits), own, block_size, s, 1.0, x.dtype)


def mix64(x: int) -> int:
    """The finalizer of SplitMix64, a bijection on 64 bits."""
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def word_type(bits: int) -> np.dtype[Any]:
    return np.dtype(np.int32 if 32 % bits == 0 else np.int64)


def lanes_of(bits: int) -> int:
    """Lanes of a word."""
    return 8 * word_type(bits).itemsize // bits


def widen(x: Array) -> Array:
    """The numbers in the type of the arithmetic."""
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x if x.dtype == np.float64 else x.astype(np.float32)


def floats(norms: Array) -> Array:
    return norms.view(np.float64 if norms.dtype == np.int64 else np.float32)
