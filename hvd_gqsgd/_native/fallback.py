"""The operators in NumPy, for where nothing was compiled: the same bits, hundreds of times slower.

Each is the function of ``hvd_gqsgd.reference`` of the same purpose, on the memory of the tensors.
Widths per block are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native.loader import REMEDY
from hvd_gqsgd.reference import linear, two_phase
from hvd_gqsgd.reference.combine import exponential_sum
from hvd_gqsgd.reference.kinds import Code
from hvd_gqsgd.reference.linear import Array

__all__ = ["NAME", "OPERATORS", "register"]

NAME = "python"
"""The name of the only instruction set."""

_SQUARES_PART = 4096  # kSquaresPart of native/core/args.h
_FIRST_TILE = 2**31  # of a tensor's number; see layout.part_identity


def register(library: torch.library.Library) -> None:
    """Implements the operators that ``library`` has declared, for tensors of the CPU."""
    for operator in OPERATORS:
        library.impl(operator.__name__, operator, "CPU")
    for name in _OF_BLOCKS:
        library.impl(name, _not_without_kernels, "CPU")
    library.impl("storage_use_counts", _storage_use_counts, "CompositeExplicitAutograd")
    library.impl("kernel_table", lambda: 0, "CompositeImplicitAutograd")
    library.impl("instruction_sets", lambda: [NAME], "CompositeImplicitAutograd")
    library.impl("instruction_set", lambda: NAME, "CompositeImplicitAutograd")
    library.impl("use_instruction_set", lambda name: None, "CompositeImplicitAutograd")


# --- one tensor ----------------------------------------------------------------------------------


def block_max(x: Tensor, block_size: int, norms: Tensor) -> None:
    _store(norms, linear.norms(_of(x), block_size))


def block_argmax(x: Tensor, block_size: int, places: Tensor) -> None:
    _store(places, linear.places_of_largest(_of(x), block_size))


def block_squares(x: Tensor, norms: Tensor, squares: Tensor, block_size: int) -> None:
    _store(squares, linear.squares(_of(x), _of(norms), block_size))


def l2_norms(norms: Tensor, squares: Tensor) -> None:
    _store(norms, linear.l2_norms(_of(norms), _of(squares)))


def quantize(
    x: Tensor, norms: Tensor, words: Tensor, block_size: int, kind: int, bits: int, levels: int,
    seed: int, step: int, tensor_id: int, rank: int, world_size: int, correlated: bool,
) -> None:  # fmt: skip
    code, values = Code(kind, bits, levels), _of(x)
    xi = linear.dither(
        values.size, block_size, seed=seed, step=step, tensor_id=tensor_id,
        rank=rank, world_size=world_size, correlated=correlated,
    )  # fmt: skip
    codes = two_phase.encode(values, _of(norms), block_size, code, xi)
    _store(words, linear.pack(codes, block_size, bits, code.bias))


def dequantize(
    words: Tensor, norms: Tensor, out: Tensor, block_size: int, kind: int, bits: int, levels: int,
    contributors: int, scale: float,
) -> None:  # fmt: skip
    to = _of(out)
    sums = linear.unpack(_of(words), to.size, block_size, bits, levels, contributors)
    _store(out, linear.decode(sums, _of(norms), block_size, levels, scale, to.dtype))


def sum_codes(
    received: Tensor, norms: Tensor, out: Tensor, block_size: int, kind: int, bits: int,
    levels: int, scale: float,
) -> None:  # fmt: skip
    to, code = _of(out), Code(kind, bits, levels)
    rows = received.numpy()
    _store(out, two_phase.summed(rows, _of(norms), to.size, block_size, code, scale, to.dtype))


def requantize(
    received: Tensor, norms: Tensor, means: Tensor, numel: int, block_size: int, kind: int,
    bits: int, levels: int, first: int, last: int, seed: int, step: int, tensor_id: int,
) -> None:  # fmt: skip
    # The blocks that the tiles are of; words of their other tiles are zeros.
    blocks, elements, before = _blocks_of(numel, block_size, first, last)
    size, first, last = elements.stop - elements.start, first - before, last - before
    begin, end = (layout.words_before(tile, size, block_size, bits) for tile in (first, last))
    rows = np.zeros((len(received), layout.words_for(size, block_size, bits)), _type(received))
    rows[:, begin:end] = received.numpy()
    all_means = two_phase.requantize(
        rows, _of(norms)[blocks], size, block_size, Code(kind, bits, levels),
        seed=seed, step=step, tensor_id=tensor_id + before * _FIRST_TILE,
    )  # fmt: skip
    at = two_phase.tile_offsets(size, block_size, bits, _type(norms))
    _store(means, all_means[at[first] : at[last]])


def dequantize_means(
    means: Tensor, norms: Tensor, out: Tensor, block_size: int, kind: int, bits: int, levels: int,
    first: int, last: int, scale: float,
) -> None:  # fmt: skip
    to = _of(out)
    blocks, elements, before = _blocks_of(to.size, block_size, first, last)
    size, first, last = elements.stop - elements.start, first - before, last - before
    at = two_phase.tile_offsets(size, block_size, bits, _type(norms))
    all_means = np.zeros(at[-1], _type(means))
    all_means[at[first] : at[last]] = _of(means)
    code = Code(kind, bits, levels)
    decoded = two_phase.decode_means(
        all_means, _of(norms)[blocks], size, block_size, code, scale, to.dtype
    )
    tile = linear.places(size, block_size, bits).tile
    to[elements] = np.where((first <= tile) & (tile < last), decoded, to[elements])


def combine(from_: Tensor, to: Tensor, bits: int, key: int) -> None:
    lanes = np.arange(8 // bits) * bits
    a, b = (_of(x)[:, None].astype(np.int64) >> lanes & ((1 << bits) - 1) for x in (from_, to))
    keys = np.full(a.shape, key % 2**64, np.uint64)
    xi = linear.hash_bits(keys, np.arange(a.size).reshape(a.shape))
    _store(to, (exponential_sum(a, b, bits, xi) << lanes).sum(1))


def sum_of_squares(x: Tensor, sum: Tensor) -> None:
    """As the kernels add: in 16 sums for each part, one element after the other."""
    values = linear.widen(_of(x)).astype(np.float64)
    parts = np.zeros((-(-values.size // _SQUARES_PART), _SQUARES_PART))
    parts.reshape(-1)[: values.size] = values
    sums = _in_order(np.square(parts).reshape(len(parts), _SQUARES_PART // 16, 16))
    sum.fill_(float(_in_order(_in_order(sums.T)[:, None])[0]))


# --- the tensors of a bucket ---------------------------------------------------------------------


def block_max_each(xs: Sequence[Tensor], block_size: int | None, norms: Tensor) -> None:
    for x, block, norm, _ in _each(xs, block_size, 8):
        block_max(x, block, norms[norm])


def quantize_each(
    xs: Sequence[Tensor], norms: Tensor, words: Tensor, block_size: int | None, kind: int,
    bits: int, levels: int, seed: int, step: int, tensor_ids: Sequence[int], rank: int,
    world_size: int, correlated: bool,
) -> None:  # fmt: skip
    each = zip(_each(xs, block_size, bits), tensor_ids, strict=True)
    for (x, block, norm, word), tensor_id in each:
        quantize(
            x, norms[norm], words[word], block, kind, bits, levels, seed, step, tensor_id,
            rank, world_size, correlated,
        )  # fmt: skip


def dequantize_each(
    words: Tensor, norms: Tensor, outs: Sequence[Tensor], word_starts: Sequence[int],
    norm_starts: Sequence[int], block_size: int | None, kind: int, bits: int, levels: int,
    contributors: int, scale: float,
) -> None:  # fmt: skip
    for out, word, norm in zip(outs, word_starts, norm_starts, strict=True):
        block = _block(out.numel(), block_size)
        num_words = layout.words_for(out.numel(), block, bits)
        dequantize(
            words[word : word + num_words], _norms_of(norms, norm, out.numel(), block), out,
            block, kind, bits, levels, contributors, scale,
        )  # fmt: skip


def requantize_each(
    received: Tensor, norms: Tensor, means: Tensor, numels: Sequence[int],
    norm_starts: Sequence[int], runs: Sequence[int], begin: int, block_size: int | None, kind: int,
    bits: int, levels: int, seed: int, step: int, tensor_ids: Sequence[int],
) -> None:  # fmt: skip
    word = 0
    for i, first, last, mean in zip(*[iter(runs)] * 4, strict=True):
        numel, block = numels[i], _block(numels[i], block_size)
        ends = [layout.words_before(tile, numel, block, bits) for tile in (first, last)]
        length = _means_length(numel, block, bits, norms, first, last)
        requantize(
            received[:, word : word + ends[1] - ends[0]],
            _norms_of(norms, norm_starts[i], numel, block),
            means[mean - begin : mean - begin + length],
            numel, block, kind, bits, levels, first, last, seed, step, tensor_ids[i],
        )  # fmt: skip
        word += ends[1] - ends[0]


def dequantize_means_each(
    means: Tensor, norms: Tensor, outs: Sequence[Tensor], norm_starts: Sequence[int],
    runs: Sequence[int], block_size: int | None, kind: int, bits: int, levels: int, scale: float,
) -> None:  # fmt: skip
    for i, first, last, mean in zip(*[iter(runs)] * 4, strict=True):
        numel, block = outs[i].numel(), _block(outs[i].numel(), block_size)
        length = _means_length(numel, block, bits, norms, first, last)
        dequantize_means(
            means[mean : mean + length], _norms_of(norms, norm_starts[i], numel, block), outs[i],
            block, kind, bits, levels, first, last, scale,
        )  # fmt: skip


OPERATORS: list[Callable[..., None]] = [
    block_max, block_argmax, block_squares, l2_norms, quantize, dequantize, sum_codes, requantize,
    dequantize_means, combine, sum_of_squares, block_max_each, quantize_each, dequantize_each,
    requantize_each, dequantize_means_each,
]  # fmt: skip
"""Of the names and arguments in ``ops``."""
_OF_BLOCKS = (
    "block_widths", "quantize_blocks", "sum_blocks", "requantize_blocks", "dequantize_blocks",
)  # fmt: skip
"""Operators that are not among them."""


def _not_without_kernels(*arguments: object) -> NoReturn:
    raise NotImplementedError(f"BlockBits needs the compiled kernels: {REMEDY}")


def _storage_use_counts(tensors: Sequence[Tensor]) -> list[int]:
    # Of the counted uses one is the storage's own Python object.
    count = torch._C._storage_Use_Count
    return [count(tensor.untyped_storage()._cdata) - 1 for tensor in tensors]


# --- memory and offsets --------------------------------------------------------------------------


def _of(tensor: Tensor) -> Array:
    """The memory of a contiguous tensor, flat, as the reference takes it."""
    flat = tensor.detach().reshape(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def _store(tensor: Tensor, values: Array) -> None:
    if tensor.numel() != values.size:
        raise ValueError(f"a buffer must have {values.size} elements, got {tensor.numel()}")
    _of(tensor)[:] = values.reshape(-1)


def _type(tensor: Tensor) -> np.dtype[Any]:
    return _of(tensor[:0]).dtype


def _in_order(terms: Array) -> Array:
    """Sums over the last dimension but one, of terms added one after the other."""
    if terms.shape[-2] == 0:
        return np.zeros(terms.shape[:-2] + terms.shape[-1:])
    summed: Array = np.add.accumulate(terms, axis=-2)[..., -1, :]
    return summed


def _block(numel: int, block_size: int | None) -> int:
    return max(numel, 1) if block_size is None else block_size


def _each(
    xs: Sequence[Tensor], block_size: int | None, bits: int
) -> Iterator[tuple[Tensor, int, slice, slice]]:
    """Each tensor of a bucket with the size of its blocks, its norms and its words."""
    norm = word = 0
    for x in xs:
        block = _block(x.numel(), block_size)
        norms = slice(norm, norm - (-x.numel() // block))
        words = slice(word, word + layout.words_for(x.numel(), block, bits))
        yield x, block, norms, words
        norm, word = norms.stop, words.stop


def _norms_of(norms: Tensor, start: int, numel: int, block: int) -> Tensor:
    return norms[start : start - (-numel // block)]


def _means_length(numel: int, block: int, bits: int, norms: Tensor, first: int, last: int) -> int:
    ends = [layout.means_before(tile, numel, block, bits, norms.dtype) for tile in (first, last)]
    return ends[1] - ends[0]


def _blocks_of(numel: int, block: int, first: int, last: int) -> tuple[slice, slice, int]:
    """The blocks that tiles are of, their elements, and the number of tiles before them."""
    tiles = -(-block // layout.TILE)
    blocks = slice(first // tiles, -(-last // tiles))
    elements = slice(min(blocks.start * block, numel), min(blocks.stop * block, numel))
    return blocks, elements, blocks.start * tiles
