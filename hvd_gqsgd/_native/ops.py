"""The native kernels as torch ops: schemas, fake kernels, and the loading of the library, or of
``fallback`` where it was not built.

The ops write into buffers that the caller owns and reuses, all on one device. Norms are ``int32``
(the bits of a float32) or, for float64 tensors, ``int64`` (the bits of a float64), one a block.
Words are ``int32`` where the lane width divides 32 and ``int64`` otherwise;
``native/core/lanes.h`` has the layout. All of them release the GIL while they run. On a
GPU they are enqueued on the current stream and return at once.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from hvd_gqsgd._native.loader import REMEDY, built, load

__all__ = [
    "COMPILED",
    "block_argmax",
    "block_max",
    "block_max_each",
    "block_squares",
    "block_widths",
    "combine",
    "dequantize",
    "dequantize_blocks",
    "dequantize_each",
    "dequantize_means",
    "dequantize_means_each",
    "devices",
    "instruction_set",
    "instruction_sets",
    "l2_norms",
    "quantize",
    "quantize_blocks",
    "quantize_each",
    "requantize",
    "requantize_blocks",
    "requantize_each",
    "storage_use_counts",
    "sum_blocks",
    "sum_codes",
    "sum_of_squares",
    "use_instruction_set",
]

_log = logging.getLogger("hvd_gqsgd")

if not hasattr(torch.library, "register_fake"):
    raise ImportError(f"hvd_gqsgd needs PyTorch 2.4 or newer, got {torch.__version__}")

# Before operators are declared, which is possible once only: a second import fails in the same way.
COMPILED = built("_C")
"""Whether there are compiled kernels; without them, ``fallback`` does their work."""

if COMPILED:
    load("_C")

_library = torch.library.Library("hvd_gqsgd", "DEF")

_library.define("block_max(Tensor x, int block_size, Tensor(a!) norms) -> ()")
_library.define("block_argmax(Tensor x, int block_size, Tensor(a!) places) -> ()")
_library.define(
    "quantize(Tensor x, Tensor norms, Tensor(a!) words, int block_size, int kind, int bits, "
    "int levels, int seed, int step, int tensor_id, int rank, int world_size, bool correlated) "
    "-> ()"
)
_library.define(
    "dequantize(Tensor words, Tensor norms, Tensor(a!) out, int block_size, int kind, int bits, "
    "int levels, int contributors, float scale) -> ()"
)
_library.define("block_squares(Tensor x, Tensor norms, Tensor(a!) squares, int block_size) -> ()")
_library.define("l2_norms(Tensor(a!) norms, Tensor squares) -> ()")
_library.define(
    "sum_codes(Tensor received, Tensor norms, Tensor(a!) out, int block_size, int kind, int bits, "
    "int levels, float scale) -> ()"
)
_library.define(
    "requantize(Tensor received, Tensor norms, Tensor(a!) means, int numel, int block_size, "
    "int kind, int bits, int levels, int first, int last, int seed, int step, int tensor_id) -> ()"
)
_library.define(
    "dequantize_means(Tensor means, Tensor norms, Tensor(a!) out, int block_size, int kind, "
    "int bits, int levels, int first, int last, float scale) -> ()"
)
_library.define("combine(Tensor from_, Tensor(a!) to, int bits, int key) -> ()")
_library.define("block_max_each(Tensor[] xs, int? block_size, Tensor(a!) norms) -> ()")
_library.define(
    "quantize_each(Tensor[] xs, Tensor norms, Tensor(a!) words, int? block_size, int kind, "
    "int bits, int levels, int seed, int step, int[] tensor_ids, int rank, int world_size, "
    "bool correlated) -> ()"
)
_library.define(
    "dequantize_each(Tensor words, Tensor norms, Tensor(a!)[] outs, int[] word_starts, "
    "int[] norm_starts, int? block_size, int kind, int bits, int levels, int contributors, "
    "float scale) -> ()"
)
_library.define(
    "requantize_each(Tensor received, Tensor norms, Tensor(a!) means, int[] numels, "
    "int[] norm_starts, int[] runs, int begin, int? block_size, int kind, int bits, int levels, "
    "int seed, int step, int[] tensor_ids) -> ()"
)
_library.define(
    "dequantize_means_each(Tensor means, Tensor norms, Tensor(a!)[] outs, int[] norm_starts, "
    "int[] runs, int? block_size, int kind, int bits, int levels, float scale) -> ()"
)
_library.define(
    "block_widths(Tensor norms, Tensor columns, int[] blocks, int[] words, int power, int least, "
    "int most, int summands, Tensor(a!) plan) -> ()"
)
_library.define(
    "quantize_blocks(Tensor[] xs, Tensor norms, Tensor plan, Tensor(a!) words, int[] blocks, "
    "int[] word_starts, int block_size, int summands, int seed, int step, int[] tensor_ids, "
    "int rank, int world_size, bool correlated, bool nearest=False) -> ()"
)
_library.define(
    "sum_blocks(Tensor received, Tensor norms, Tensor plan, Tensor(a!) out, int first, "
    "int[] blocks, int[] word_starts, int rank, int block_size, int summands, int contributors, "
    "float scale) -> ()"
)
_library.define(
    "requantize_blocks(Tensor received, Tensor norms, Tensor plan, Tensor(a!) means, int[] numels, "
    "int[] norm_starts, int[] runs, int[] blocks, int[] word_starts, int rank, int block_size, "
    "int seed, int step, int[] tensor_ids) -> ()"
)
_library.define(
    "dequantize_blocks(Tensor means, Tensor norms, Tensor plan, Tensor(a!)[] outs, "
    "int[] norm_starts, int[] runs, int[] blocks, int[] word_starts, int block_size, float scale) "
    "-> ()"
)
_library.define("sum_of_squares(Tensor x, Tensor(a!) sum) -> ()")
_library.define("storage_use_counts(Tensor[] tensors) -> int[]")
_library.define("kernel_table() -> int")
_library.define("instruction_sets() -> str[]")
_library.define("instruction_set() -> str")
_library.define("use_instruction_set(str name) -> ()")

for _name in (
    "block_max", "quantize", "dequantize", "block_squares", "l2_norms", "requantize",
    "dequantize_means", "combine", "sum_of_squares", "block_max_each", "quantize_each",
    "dequantize_each", "requantize_each", "dequantize_means_each", "block_widths",
    "quantize_blocks", "requantize_blocks", "dequantize_blocks", "sum_codes", "sum_blocks",
    "block_argmax",
):  # fmt: skip
    # They only write to their arguments, so there is no shape to infer.
    torch.library.register_fake(f"hvd_gqsgd::{_name}", lambda *args: None, lib=_library)

if not COMPILED:
    from hvd_gqsgd._native import fallback

    _log.warning("no kernels are compiled: NumPy does their work, which is slow: %s", REMEDY)
    fallback.register(_library)

_ops = torch.ops.hvd_gqsgd


@functools.cache
def devices() -> tuple[str, ...]:
    """Types of the devices that there are kernels for; this does not initialize CUDA."""
    if not built("_cuda"):
        return ("cpu",)
    try:
        load("_cuda")
    except ImportError as error:
        _log.warning("the kernels for GPUs cannot be used: %s", error)
        return ("cpu",)
    return ("cpu", "cuda")


devices()

block_max = _ops.block_max.default
"""``block_max(x, block_size, norms)``: largest magnitude of each block of consecutive elements.

``x``: contiguous floating-point tensor. NaN counts as larger than infinity, infinity as larger than
any number.
"""

block_argmax = _ops.block_argmax.default
"""``block_argmax(x, block_size, places)``: the place in its block of the first element with the
largest magnitude, NaN before infinity. ``places``: ``uint8`` for blocks of at most 256 elements, or
``int16``, of unsigned numbers, for at most 65,536.
"""

quantize = _ops.quantize.default
"""``quantize(x, norms, words, block_size, kind, bits, levels, seed, step, tensor_id, rank,
world_size, correlated)``: rounds ``x`` to codes on the scale of ``norms``, by dither or as its kind
says, and packs them.

``kind``, ``bits`` and ``levels``, here and below, are those of a ``Codec``. ``norms`` must be at
least the magnitudes of ``x``; values beyond them are cut off.
"""

dequantize = _ops.dequantize.default
"""``dequantize(words, norms, out, block_size, kind, bits, levels, contributors, scale)``: ``scale``
times the sum that the words of ``contributors`` ranks, added up, stand for. For codes that can be
added.
"""

block_squares = _ops.block_squares.default
"""``block_squares(x, norms, squares, block_size)``: sum of the squares of each block, as ``int64``,
on the scale of the block's largest magnitude over all ranks, ``norms``. Ranks add them up.
"""

l2_norms = _ops.l2_norms.default
"""``l2_norms(norms, squares)``: turns the largest magnitudes in ``norms`` into L2 norms, where
``squares`` are the sums over all ranks. Finite norms stay finite, and never become smaller.
"""

sum_codes = _ops.sum_codes.default
"""``sum_codes(received, norms, out, block_size, kind, bits, levels, scale)``: ``scale`` times the
sum over the ranks, whose words are a row of ``received`` each. Nothing is rounded to codes again.
"""

requantize = _ops.requantize.default
"""``requantize(received, norms, means, numel, block_size, kind, bits, levels, first, last, seed,
step, tensor_id)``: averages the codes of tiles ``first`` to ``last`` (excluded) of a tensor of
``numel`` elements and rounds the means stochastically to codes, on a norm of each tile's own.

``received`` has a row for each rank, with the words of just these tiles.
"""

dequantize_means = _ops.dequantize_means.default
"""``dequantize_means(means, norms, out, block_size, kind, bits, levels, first, last, scale)``:
``scale`` times the means of tiles ``first`` to ``last`` (excluded), to their places in ``out``.
"""

combine = _ops.combine.default
"""``combine(from_, to, bits, key)``: exponential codes in ``uint8`` tensors; those in ``to`` become
codes that stand for the sum of both on average, where no sum exceeds the largest level.
"""

block_max_each = _ops.block_max_each.default
"""``block_max_each(xs, block_size, norms)``: ``block_max`` of each tensor of a bucket, with the
norms one behind the other. Without a block size, here and below, all of a tensor shares one norm.
"""

quantize_each = _ops.quantize_each.default
"""``quantize_each(xs, norms, words, block_size, kind, bits, levels, seed, step, tensor_ids, rank,
world_size, correlated)``: ``quantize`` of each tensor of a bucket; norms and words are one behind
the other.
"""

dequantize_each = _ops.dequantize_each.default
"""``dequantize_each(words, norms, outs, word_starts, norm_starts, block_size, kind, bits, levels,
contributors, scale)``: ``dequantize`` of some tensors of a bucket, whose words and norms begin at
``word_starts`` and ``norm_starts``.
"""

requantize_each = _ops.requantize_each.default
"""``requantize_each(received, norms, means, numels, norm_starts, runs, begin, block_size, kind,
bits, levels, seed, step, tensor_ids)``: ``requantize`` of runs of tiles of a bucket's tensors.

``runs`` has four numbers a run: the tensor, the first tile, the one after the last, and where its
means begin in those of the bucket, of which ``means`` are those from ``begin`` on. ``received`` has
the words of the runs one behind the other.
"""

dequantize_means_each = _ops.dequantize_means_each.default
"""``dequantize_means_each(means, norms, outs, norm_starts, runs, block_size, kind, bits, levels,
scale)``: ``dequantize_means`` of runs of tiles, as in ``requantize_each``, to ``outs``.
"""

block_widths = _ops.block_widths.default
"""``block_widths(norms, columns, blocks, words, power, least, most, summands, plan)``: the widths
of the blocks of a bucket, from their global norms; ``native/core/block_bits.h`` has the rule.

Blocks ``blocks[r]`` to ``blocks[r + 1]`` share the words ``words[r]`` to ``words[r + 1]`` of a
message. ``columns`` (``uint8``) has the columns of each block, ``power`` is in units of 1/256.
``plan`` (``int32``) gets the width of each block, the first word of each, and the end. Codes of
which ``summands`` are added have words of 64 bits, counted as two, here and below.
"""

quantize_blocks = _ops.quantize_blocks.default
"""``quantize_blocks(xs, norms, plan, words, blocks, word_starts, block_size, summands, seed, step,
tensor_ids, rank, world_size, correlated, nearest=False)``: ``quantize_each`` at the widths of a
plan, of which ``blocks`` and ``word_starts``, here and below, are the segments.
"""

sum_blocks = _ops.sum_blocks.default
"""``sum_blocks(received, norms, plan, out, first, blocks, word_starts, rank, block_size, summands,
contributors, scale)``: ``sum_codes`` at the widths of a plan, for a tensor of the segment ``rank``
whose blocks begin at ``first``; ``received`` has the words of that segment. With ``summands`` above
1 it is one row, the sum of the words of ``contributors`` ranks.
"""

requantize_blocks = _ops.requantize_blocks.default
"""``requantize_blocks(received, norms, plan, means, numels, norm_starts, runs, blocks, word_starts,
rank, block_size, seed, step, tensor_ids)``: ``requantize_each`` for the segment ``rank``, whose
means are a flag, a norm for each block, and its words. A run ends with the segment that it is of.
"""

dequantize_blocks = _ops.dequantize_blocks.default
"""``dequantize_blocks(means, norms, plan, outs, norm_starts, runs, blocks, word_starts, block_size,
scale)``: ``dequantize_means_each``, from the means of all segments.
"""

storage_use_counts = _ops.storage_use_counts.default
"""``storage_use_counts(tensors) -> list[int]``: how many tensors share the memory of each, with the
tensor itself."""

instruction_sets = _ops.instruction_sets.default
"""``instruction_sets() -> list[str]``: those this build has kernels for and this processor runs."""

instruction_set = _ops.instruction_set.default
"""``instruction_set() -> str``: the one in use, by default the last of ``instruction_sets()``."""

use_instruction_set = _ops.use_instruction_set.default
"""``use_instruction_set(name)``: for tests and benchmarks; results are the same bits with each."""


def sum_of_squares(x: Tensor) -> Tensor:
    """Of a contiguous tensor; in float64, of no dimensions, on its device; the same to the bit on
    every machine."""
    total = torch.empty((), dtype=torch.float64, device=x.device)
    _ops.sum_of_squares.default(x, total)
    return total
