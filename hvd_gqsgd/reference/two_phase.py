"""Exponential dithering and the two-phase exchange in plain NumPy: ``linear.py`` goes on here.

Exponential dithering has the levels 0 and +-2^-k, k = 0, 1, ..., K. A share y = x / M with |y|
between neighbouring levels a < b becomes, with a sign in front,

    b with the probability (|y| - a) / (b - a), and a otherwise

so its code is right on average. A code is a sign on top of the level's number, which is 0 for the
level 0 and K + 1 - k for 2^-k. With 8 bits K is 126, with 4 bits 6. It is the exponential dithering
of Global-QSGD (arXiv 2305.18627), which has it from natural compression (Horváth, Ho, Horváth,
Sahu, Canini, Richtárik: "Natural Compression for Distributed Deep Learning", arXiv 1905.10988).

Sums of such levels are no levels, so the exchange has two phases. Each tile of a tensor has an
owner, who decodes the codes of all n ranks, averages, and rounds the means once more, on the scale
of

    R = the largest magnitude of a mean in the tile, as a share of M

and all ranks decode code * R * M. Linear codes can travel this way too, with as many levels as
their lanes hold, however many ranks there are.

Arrays and types are those of ``linear.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hvd_gqsgd.reference.kinds import EXPONENTIAL, NEAREST, Code, two_phase_code
from hvd_gqsgd.reference.linear import (
    Array,
    codes,
    dither_stream,
    floats,
    lanes_of,
    narrow,
    pack,
    places,
    shared_norms,
    shares,
    unpack,
    widen,
    word_type,
)
from hvd_gqsgd.reference.linear import dither as dither_of_rank

__all__ = [
    "decode_means",
    "encode",
    "exponential_codes",
    "exponential_levels",
    "one_phase_mean",
    "requantize",
    "summed",
    "tile_offsets",
    "two_phase_mean",
]

REQUANTIZE_STREAM = 2**64 - 1  # of the dither of the second rounding, which is one for all ranks


def exponential_codes(
    x: Array, norms: Array, block_size: int | None, bits: int, xi: Array, headroom: int = 0
) -> Array:
    """Up where the probability of going up and xi, both cut to 23 binary places, add up to 1.

    A share is rounded to float32, and multiplied by 2^-headroom. 0 where M is not finite.
    """
    maxima = floats(norms)[places(x.size, block_size, 8).block]
    y = shares(widen(x), maxima, 1).astype(np.float32) * np.float32(2.0**-headroom)
    share = abs(y).astype(np.float64)  # in which all that follows is exact
    top = (1 << (bits - 1)) - 1  # the number of the level 1
    exponent = np.frexp(share)[1] - 1  # 2^exponent is the power of two at or below
    number = np.where(share > 0, np.maximum(exponent + top, 0), 0)  # of the level at or below
    below = np.where(number, np.exp2(number - float(top)), 0.0)
    above = np.exp2(number + 1 - float(top))
    chance = (share - below) / (above - below)
    up = (chance * 2**23).astype(np.int64) + (xi >> np.uint32(9)) >= 2**23
    out: Array = number + up + (np.signbit(y).astype(np.int64) << (bits - 1))
    return out


def exponential_levels(codes: Array, bits: int) -> Array:
    """The level, from -1 to 1 (``float32``), of each code."""
    top = (1 << (bits - 1)) - 1  # the number of the level 1
    level = np.where(codes & top, np.exp2((codes & top) - float(top)), 0.0)
    return np.where(codes >> (bits - 1) & 1, -level, level).astype(np.float32)


class _MeansPlaces(NamedTuple):
    offsets: Array  # of each tile and of the end, in units
    norm: Array  # of each tile, in the buffer as norms
    word: Array  # of each word, in the buffer as words


def _means_places(numel: int, block_size: int | None, bits: int, norm_type: Any) -> _MeansPlaces:
    """A unit is as long as the longer of a norm and a word. A tile takes a unit for its norm, and
    as many as its words fill.
    """
    word_size, norm_size = word_type(bits).itemsize, np.dtype(norm_type).itemsize
    unit = max(word_size, norm_size)
    at = places(numel, block_size, bits)
    last = np.zeros(at.tile.max(initial=-1) + 1, np.int64)
    np.maximum.at(last, at.tile, at.word + 1)  # where the words of each tile end
    words = np.diff(last, prepend=0)
    offsets = np.append(0, np.cumsum(1 + -(-words * word_size // unit)))
    begin = (offsets[:-1] + 1) * (unit // word_size) - (last - words)
    word = np.arange(words.sum()) + np.repeat(begin, words)
    return _MeansPlaces(offsets, offsets[:-1] * (unit // norm_size), word)


def tile_offsets(numel: int, block_size: int | None, bits: int, norm_type: Any) -> Array:
    """Where each tile's mean begins, and where the last one's ends, in elements of the buffer."""
    return _means_places(numel, block_size, bits, norm_type).offsets


def encode(x: Array, norms: Array, block_size: int | None, code: Code, xi: Array) -> Array:
    """The codes of one rank, of any kind; to nearest with 1/2 for all dither."""
    if code.kind == NEAREST:
        xi = np.full_like(xi, 2**31)
    if code.kind != EXPONENTIAL:
        return codes(x, norms, block_size, code.levels, xi, code.bits)
    return exponential_codes(x, norms, block_size, code.bits, xi)


def _one(code: Code) -> int:
    """What the norm itself is as a number of ``_contents``."""
    return 1 if code.kind == EXPONENTIAL else code.levels


def _contents(words: Array, numel: int, block_size: int | None, code: Code, real: Any) -> Array:
    """The codes of one rank, as numbers: from -s to s, or levels from -1 to 1."""
    bits = code.bits
    c = unpack(words, numel, block_size, bits, code.bias, 1)
    if code.kind == EXPONENTIAL:
        return exponential_levels(c % (1 << bits), bits).astype(real)
    # The top lane is signed. No word that ranks make has anything above it.
    top = places(numel, block_size, bits).lane == lanes_of(bits) - 1
    half = 1 << (bits - 1)
    return np.where(top, (c + half) % (2 * half) - half, c)


def _share(
    received: Array, numel: int, block_size: int | None, code: Code, real: Any, scale: float
) -> Array:
    """scale * the sum of the rows, in the order of the rows, as a share of the norm."""
    total = np.zeros(numel, real if code.kind == EXPONENTIAL else np.int64)
    for words in received:
        total += _contents(words, numel, block_size, code, real)
    share: Array = total.astype(real) * real(scale / _one(code))
    return share


def summed(
    received: Array, norms: Array, numel: int, block_size: int | None, code: Code, scale: float,
    dtype: Any,
) -> Array:  # fmt: skip
    """scale * the sum of the rows * M, in the order of the rows; NaN where M is not finite."""
    maxima = floats(norms)[places(numel, block_size, code.bits).block]
    real = maxima.dtype.type
    with np.errstate(over="ignore", invalid="ignore"):
        out = _share(received, numel, block_size, code, real, scale) * maxima
    return narrow(np.where(np.isfinite(maxima), out, real(np.nan)), dtype)


def requantize(
    received: Array, norms: Array, numel: int, block_size: int | None, code: Code, *,
    seed: int, step: int, tensor_id: int,
) -> Array:  # fmt: skip
    """The means of all tiles, from the words of n ranks, one row each.

    Levels are added up in the order of the rows. Tiles whose M is not finite are all zeros.
    """
    bits = code.bits
    at = places(numel, block_size, bits)
    finite = np.isfinite(floats(norms))[at.block]
    real = floats(norms).dtype.type
    mean = np.where(
        finite, _share(received, numel, block_size, code, real, 1 / len(received)), real(0)
    )

    largest = np.zeros(at.tile.max(initial=-1) + 1, real)
    np.maximum.at(largest, at.tile, abs(mean))
    xi = dither_stream(
        numel, block_size, seed=seed, step=step, tensor_id=tensor_id, stream=REQUANTIZE_STREAM
    )
    of_element = largest.view(norms.dtype)[at.tile]  # so that blocks of one element have a norm
    words = pack(encode(mean, of_element, 1, code, xi), block_size, bits, code.bias)
    words[at.word[~finite]] = 0

    to = _means_places(numel, block_size, bits, norms.dtype)
    unit = np.int64 if 8 in (norms.itemsize, words.itemsize) else np.int32
    means = np.zeros(to.offsets[-1], unit)
    means.view(norms.dtype)[to.norm] = largest.view(norms.dtype)
    means.view(words.dtype)[to.word] = words
    return means


def decode_means(
    means: Array, norms: Array, numel: int, block_size: int | None, code: Code,
    scale: float, dtype: Any,
) -> Array:  # fmt: skip
    """scale * code * R * M, with code / s for linear codes; NaN where M is not finite."""
    at = places(numel, block_size, code.bits)
    where = _means_places(numel, block_size, code.bits, norms.dtype)
    largest, maxima = floats(means.view(norms.dtype)[where.norm]), floats(norms)[at.block]
    real = maxima.dtype.type
    words = means.view(word_type(code.bits))[where.word]
    c = _contents(words, numel, block_size, code, real).astype(real)
    with np.errstate(over="ignore", invalid="ignore"):
        out = ((c * real(scale / _one(code))) * largest[at.tile]) * maxima
    return narrow(np.where(np.isfinite(maxima), out, real(np.nan)), dtype)


def two_phase_mean(
    rows: Array, *, dither: str, bits: int, block_size: int | None, correlated: bool, seed: int,
    step: int, tensor_id: int, norm: str = "max",
) -> Array:  # fmt: skip
    """The whole of it: what n ranks, with one row each, decode.

    ``dither`` is "linear" or "exponential", ``norm`` "max" or "l2".
    """
    code, numel = two_phase_code(dither, bits), rows.shape[1]
    shared = shared_norms(rows, block_size, norm)
    at = {"seed": seed, "step": step, "tensor_id": tensor_id}
    sent = _send(rows, shared, block_size, code, correlated, at)
    means = requantize(sent, shared, numel, block_size, code, **at)
    return decode_means(means, shared, numel, block_size, code, 1.0, rows.dtype)


def one_phase_mean(
    rows: Array, *, dither: str, bits: int, block_size: int | None, correlated: bool, seed: int,
    step: int, tensor_id: int, norm: str = "max",
) -> Array:  # fmt: skip
    """The mean of a shard, of which n ranks have one row each, on the rank that owns it."""
    code, numel = two_phase_code(dither, bits), rows.shape[1]
    shared = shared_norms(rows, block_size, norm)
    at = {"seed": seed, "step": step, "tensor_id": tensor_id}
    sent = _send(rows, shared, block_size, code, correlated, at)
    return summed(sent, shared, numel, block_size, code, 1 / len(sent), rows.dtype)


def _send(
    rows: Array, shared: Array, block_size: int | None, code: Code, correlated: bool,
    at: dict[str, int],
) -> Array:  # fmt: skip
    n, numel = rows.shape
    sent = []
    for rank, x in enumerate(rows):
        xi = dither_of_rank(numel, block_size, rank=rank, world_size=n, correlated=correlated, **at)
        codes_ = encode(x, shared, block_size, code, xi)
        sent.append(pack(codes_, block_size, code.bits, code.bias))
    return np.array(sent)
