"""The native kernels as torch ops: schemas, fake kernels, and the loading of the library.

The ops write into buffers that the caller owns and reuses. Norms are ``int32`` (the bits of a
float32) or, for float64 tensors, ``int64`` (the bits of a float64), one a block. Words are
``int32`` where the lane width divides 32 and ``int64`` otherwise; ``native/include/gqsgd/lanes.h``
has the layout. All of them release the GIL while they run.
"""

from __future__ import annotations

import importlib.util

import torch

__all__ = [
    "block_max",
    "dequantize",
    "instruction_set",
    "instruction_sets",
    "norm_dtype",
    "parts",
    "quantize",
    "storage_use_count",
    "use_instruction_set",
    "word_dtype",
    "words_for",
]

TILE = 1024  # elements that are packed together: kTile of native/include/gqsgd/lanes.h

_library = torch.library.Library("hvd_gqsgd", "DEF")

_library.define("block_max(Tensor x, int block_size, Tensor(a!) norms) -> ()")
_library.define(
    "quantize(Tensor x, Tensor norms, Tensor(a!) words, int block_size, int bits, int levels, "
    "int seed, int step, int tensor_id, int rank, int world_size, bool correlated) -> ()"
)
_library.define(
    "dequantize(Tensor words, Tensor norms, Tensor(a!) out, int block_size, int bits, int levels, "
    "int contributors, float scale) -> ()"
)
_library.define("storage_use_count(Tensor tensor) -> int")
_library.define("parts() -> str[]")
_library.define("instruction_sets() -> str[]")
_library.define("instruction_set() -> str")
_library.define("use_instruction_set(str name) -> ()")

for _name in ("block_max", "quantize", "dequantize"):
    # They only write to their arguments, so there is no shape to infer.
    torch.library.register_fake(f"hvd_gqsgd::{_name}", lambda *args: None, lib=_library)

_spec = importlib.util.find_spec("hvd_gqsgd._C")
if _spec is None or _spec.origin is None:
    raise ImportError(
        "the native part of hvd_gqsgd is not built: run `pip install --no-build-isolation .` in "
        "its repository, with the torch that it is to work with installed"
    )
torch.ops.load_library(_spec.origin)
_ops = torch.ops.hvd_gqsgd

block_max = _ops.block_max.default
"""``block_max(x, block_size, norms)``: largest magnitude of each block of consecutive elements.

``x``: contiguous floating-point tensor. NaN counts as larger than infinity, infinity as larger than
any number.
"""

quantize = _ops.quantize.default
"""``quantize(x, norms, words, block_size, bits, levels, seed, step, tensor_id, rank, world_size,
correlated)``: rounds ``x`` stochastically to codes on the scale of ``norms`` and packs them.

``norms`` must be at least the magnitudes of ``x``; values beyond them are cut off.
"""

dequantize = _ops.dequantize.default
"""``dequantize(words, norms, out, block_size, bits, levels, contributors, scale)``: ``scale`` times
the sum that the words of ``contributors`` ranks, added up, stand for.
"""

storage_use_count = _ops.storage_use_count.default
"""``storage_use_count(tensor) -> int``: how many tensors share this one's memory, with itself."""

parts = _ops.parts.default
"""``parts() -> list[str]``: the native parts that were compiled in."""

instruction_sets = _ops.instruction_sets.default
"""``instruction_sets() -> list[str]``: those this build has kernels for and this processor runs."""

instruction_set = _ops.instruction_set.default
"""``instruction_set() -> str``: the one in use, by default the last of ``instruction_sets()``."""

use_instruction_set = _ops.use_instruction_set.default
"""``use_instruction_set(name)``: for tests and benchmarks; results are the same bits with each."""


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type that the norms of tensors of this type travel as."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def word_dtype(bits: int) -> torch.dtype:
    """The type of the words that lanes of this width are packed in."""
    return torch.int32 if 32 % bits == 0 else torch.int64


def words_for(numel: int, block_size: int, bits: int) -> int:
    """How many words the codes of a tensor take."""
    lanes = (32 if 32 % bits == 0 else 64) // bits

    def in_block(elements: int) -> int:
        return elements // TILE * -(-TILE // lanes) + -(-(elements % TILE) // lanes)

    return numel // block_size * in_block(block_size) + in_block(numel % block_size)
