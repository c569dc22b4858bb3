"""The native operators refuse arguments with which a kernel would leave its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.reference.kinds import LINEAR

X = torch.ones(100)
NORMS = torch.zeros(10, dtype=torch.int32)
PLACES = torch.zeros(10, dtype=torch.uint8)
WORDS = torch.zeros(30, dtype=torch.int32)
TRANSPOSED = torch.ones(10, 10).t()
DTYPE_MESSAGE = "the tensor must be float16, bfloat16, float32 or float64, got "
LEVELS_MESSAGE = "levels must be from 1 to 127 for linear codes of 8 bits, got "
KIND_MESSAGE = "kind must be 0 (linear) or 1 (exponential) or 2 (nearest), got "
CONTRIBUTORS_MESSAGE = "contributors must be from 1 to "


def quantize(
    x: Tensor = X, norms: Tensor = NORMS, words: Tensor = WORDS, block_size: int = 10,
    kind: int = LINEAR, bits: int = 8, levels: int = 127, rank: int = 0, world_size: int = 1,
) -> None:  # fmt: skip
    """A valid call, of which each test spoils one argument."""
    ops.quantize(x, norms, words, block_size, kind, bits, levels, 0, 0, 0, rank, world_size, True)


def dequantize(
    words: Tensor = WORDS, norms: Tensor = NORMS, out: Tensor = X, block_size: int = 10,
    kind: int = LINEAR, bits: int = 8, levels: int = 127, contributors: int = 1,
) -> None:  # fmt: skip
    """The same for the other direction."""
    out = out.clone() if out is X else out
    ops.dequantize(words, norms, out, block_size, kind, bits, levels, contributors, 1.0)


def test_the_calls_that_the_errors_below_start_from_are_valid() -> None:
    """Or the tests of errors would say little."""
    ops.block_max(X, 10, NORMS.clone())
    ops.block_argmax(X, 10, PLACES.clone())
    quantize()
    dequantize()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.block_max(X.int(), 10, NORMS), TypeError, DTYPE_MESSAGE + "Int"),
        (lambda: ops.block_max(X.cfloat(), 10, NORMS), TypeError, DTYPE_MESSAGE + "ComplexFloat"),
        (lambda: ops.block_max(TRANSPOSED, 10, NORMS), ValueError, "the tensor must be contiguous"),
        (lambda: ops.block_max(X, 0, NORMS), ValueError, "block_size must be at least 1, got 0"),
        (lambda: ops.block_max(X, 10, NORMS[:9]), ValueError, "norms must have 10 elements, got 9"),
        (lambda: ops.block_max(X, 10, NORMS.long()), TypeError, "norms must be Int, got Long"),
        (lambda: ops.block_max(X.double(), 10, NORMS), TypeError, "norms must be Long, got Int"),
        (lambda: ops.block_argmax(X.int(), 10, PLACES), TypeError, DTYPE_MESSAGE + "Int"),
        (lambda: ops.block_argmax(X, 0, PLACES), ValueError, "block_size must be at least 1, got"),
        (
            lambda: ops.block_argmax(X, 257, PLACES),
            ValueError, "block_size must be at most 256 for places of Byte, got 257",
        ),
        (
            lambda: ops.block_argmax(X, 65_537, PLACES.short()),
            ValueError, "block_size must be at most 65536 for places of Short, got 65537",
        ),
        (lambda: ops.block_argmax(X, 9, PLACES), ValueError, "places must have 12 elements, got"),
        (lambda: ops.block_argmax(X, 10, NORMS), TypeError, "places must be Short, got Int"),
        (lambda: quantize(x=X.int()), TypeError, DTYPE_MESSAGE + "Int"),
        (lambda: quantize(x=TRANSPOSED), ValueError, "the tensor must be contiguous"),
        (lambda: quantize(norms=NORMS[:9]), ValueError, "norms must have 10 elements, got 9"),
        (lambda: quantize(norms=NORMS.float()), TypeError, "norms must be Int, got Float"),
        (lambda: quantize(words=WORDS[:-1]), ValueError, "words must have 30 elements, got 29"),
        (lambda: quantize(words=WORDS.long()), TypeError, "words must be Int, got Long"),
        (lambda: quantize(words=WORDS.repeat(2)[::2]), ValueError, "words must be contiguous"),
        (lambda: quantize(bits=7, levels=3), TypeError, "words must be Long, got Int"),
        (lambda: quantize(block_size=-1), ValueError, "block_size must be at least 1, got -1"),
        (lambda: quantize(bits=1), ValueError, "bits must be from 2 to 16, got 1"),
        (lambda: quantize(bits=17), ValueError, "bits must be from 2 to 16, got 17"),
        (lambda: quantize(levels=-1), ValueError, LEVELS_MESSAGE + "-1"),
        (lambda: quantize(levels=128), ValueError, LEVELS_MESSAGE + "128"),
        (lambda: quantize(levels=0), ValueError, LEVELS_MESSAGE + "0"),
        (lambda: quantize(kind=3), ValueError, KIND_MESSAGE + "3"),
        (lambda: quantize(kind=-1), ValueError, KIND_MESSAGE + "-1"),
        (lambda: quantize(kind=2**32), ValueError, KIND_MESSAGE + "4294967296"),
        (lambda: quantize(rank=-1), ValueError, "rank must be from 0 to 0, got -1"),
        (lambda: quantize(rank=3, world_size=3), ValueError, "rank must be from 0 to 2, got 3"),
        (lambda: quantize(world_size=2**32), ValueError, "world_size must be from 1 to 2147483647"),
        (lambda: quantize(world_size=0), ValueError, "world_size must be from 1 to 2147483647"),
        (lambda: dequantize(out=X.int()), TypeError, DTYPE_MESSAGE + "Int"),
        (lambda: dequantize(out=TRANSPOSED), ValueError, "the tensor must be contiguous"),
        (lambda: dequantize(norms=NORMS[:9]), ValueError, "norms must have 10 elements, got 9"),
        (lambda: dequantize(words=WORDS[:-1]), ValueError, "words must have 30 elements, got 29"),
        (lambda: dequantize(bits=33), ValueError, "bits must be from 2 to 16, got 33"),
        (lambda: dequantize(levels=200), ValueError, LEVELS_MESSAGE + "200"),
        (lambda: dequantize(levels=0), ValueError, LEVELS_MESSAGE + "0"),
        (lambda: dequantize(kind=3), ValueError, KIND_MESSAGE + "3"),
        (
            lambda: dequantize(contributors=0), ValueError,
            CONTRIBUTORS_MESSAGE + "1 for 8 bits and 127 levels, got 0",
        ),
        (
            lambda: dequantize(levels=31, contributors=5), ValueError,
            CONTRIBUTORS_MESSAGE + "4 for 8 bits and 31 levels, got 5",
        ),
        (lambda: ops.use_instruction_set("z80"), ValueError, "no kernels for z80 here"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    """They say what is wrong, what was got, and what is accepted."""
    with pytest.raises(error, match=re.escape(message)):
        call()
