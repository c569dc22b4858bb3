"""The kernels of the two-phase exchange take any bits that peers send, and no wrong buffers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    TWO_PHASE_CODES,
    as_numpy,
    assert_same,
    bits_of,
    data,
    decode_means,
    exchange,
    from_bits,
    instruction_set,
    name,
    norms,
    requantize,
    several,
    tiles_of,
)
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference import two_phase as reference_two_phase
from hvd_gqsgd.reference.kinds import EXPONENTIAL, Code, exponential, linear


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_any_words_have_the_reference_s_means(dtype: torch.dtype, code: Code) -> None:
    """To the bit, padding and blocks that are not finite too, whatever ranks have sent."""
    rng = np.random.default_rng(0)
    info = torch.iinfo(layout.word_dtype(code.bits))
    for block_size, numel, n in [(1, 50, 2), (7, 300, 3), (1500, 5000, 5), (None, 3333, 1)]:
        rows = several(rng, 3, (1, numel), dtype)
        shared = norms(rows[0], block_size)
        # Lanes of all contents, and the top one with more than one rank could fill it with.
        words = torch.from_numpy(
            rng.integers(
                info.min, info.max, (n, layout.words_for(numel, block_size or numel, code.bits)),
                dtype=f"int{info.bits}", endpoint=True,
            )
        )  # fmt: skip
        expected = reference_two_phase.requantize(
            words.numpy(), shared.numpy(), numel, block_size, code, seed=1, step=2, tensor_id=3
        )
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                means = requantize(
                    words, shared, numel, block_size, code, seed=1, step=2, tensor_id=3
                )
            assert_same(means, expected, (isa, block_size, numel))


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_any_means_decode_as_in_the_reference(dtype: torch.dtype, code: Code) -> None:
    """Norms of tiles of any bits too: what a peer sends may be anything."""
    rng = np.random.default_rng(1)
    for block_size, numel in [(1, 500), (7, 300), (1500, 5000), (None, 3333)]:
        like = data(rng, 3, numel, dtype)
        shared = norms(like, block_size)
        wide = 8 in (shared.element_size(), layout.word_dtype(code.bits).itemsize)
        info = torch.iinfo(torch.int64 if wide else torch.int32)
        norm_type = f"i{shared.element_size()}"
        offsets = reference_two_phase.tile_offsets(numel, block_size, code.bits, norm_type)
        fuzz = rng.integers(info.min, info.max, offsets[-1], dtype=f"int{info.bits}", endpoint=True)
        for scale in (1.0, -0.3, 1e30):
            with np.errstate(all="ignore"):
                expected = reference_two_phase.decode_means(
                    fuzz, shared.numpy(), numel, block_size, code, scale, as_numpy(like).dtype
                )
            expected = torch.from_numpy(expected.view(f"i{expected.itemsize}")).view(dtype)
            for isa in ops.instruction_sets():
                with instruction_set(isa):
                    cuts = sorted(int(cut) for cut in rng.integers(0, len(offsets), 2))
                    got = decode_means(
                        torch.from_numpy(fuzz), shared, like, block_size, code, scale, cuts
                    )
                # NaNs may differ in their bits: those of a peer's norm come through.
                assert torch.equal(got.isnan(), expected.isnan())
                number = ~got.isnan()
                assert torch.equal(bits_of(got[number]), bits_of(expected[number]))


def within(rubbish: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of this amid rubbish, and the whole of it."""
    whole = torch.cat([rubbish[:64], content.flatten(), rubbish[64:]])
    return whole[64 : 64 + content.numel()].view(content.shape), whole


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_buffers_are_not_left(dtype: torch.dtype, code: Code) -> None:
    """Any bits as words, means and norms: nothing around the outputs is written to, and nothing
    around the inputs has an influence.
    """
    rng = np.random.default_rng(2)

    def fuzz(dtype: torch.dtype, *shape: int) -> Tensor:
        info = torch.iinfo(dtype)
        bits = rng.integers(info.min, info.max, shape, dtype=f"int{info.bits}", endpoint=True)
        return torch.from_numpy(bits)

    norm_type, word_type = layout.norm_dtype(dtype), layout.word_dtype(code.bits)
    unit = max(norm_type, word_type, key=lambda type: type.itemsize)
    for block, numel, n in [(7, 300, 3), (1500, 3000, 2), (5000, 1025, 1), (2**63 - 1, 10, 2)]:
        shared = fuzz(norm_type, -(-numel // block))
        tiles = tiles_of(numel, block, code.bits)
        first, last = tiles // 3, tiles - tiles // 4
        size = reference_two_phase.tile_offsets(
            numel, block, code.bits, f"i{shared.element_size()}"
        )
        at = reference.places(numel, block, code.bits)
        inside = np.unique(at.word[(first <= at.tile) & (at.tile < last)]).size
        words, means = fuzz(word_type, n, inside), fuzz(unit, size[-1])
        outputs = []
        for _ in range(2):
            near_norms, _ = within(fuzz(norm_type, 128), shared)
            received, _ = within(fuzz(word_type, 128), words)
            to_decode, _ = within(fuzz(unit, 128), means)
            edge, float_edge = fuzz(unit, 128), from_bits(torch.arange(128), dtype)
            part, around = within(edge, torch.zeros(size[last] - size[first], dtype=unit))
            out, around_out = within(float_edge, torch.zeros(numel, dtype=dtype))
            ops.requantize(received, near_norms, part, numel, block, *code, first, last, 1, 2, 3)
            ops.dequantize_means(to_decode, near_norms, out, block, *code, 0, tiles, 0.5)
            assert torch.equal(around[:64], edge[:64])
            assert torch.equal(around[-64:], edge[64:])
            assert torch.equal(bits_of(around_out[:64]), bits_of(float_edge[:64]))
            assert torch.equal(bits_of(around_out[-64:]), bits_of(float_edge[64:]))
            outputs.append((part, bits_of(out)))
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert torch.equal(outputs[0][1], outputs[1][1])


# --- errors --------------------------------------------------------------------------------------

X = torch.ones(100)
NORMS = torch.zeros(10, dtype=torch.int32)
WORDS = torch.zeros(2, 30, dtype=torch.int32)
MEANS = torch.zeros(40, dtype=torch.int32)
CODE = linear(8, 127)
ROWS = "received must be a row of 30 words for each rank, got "


def requantize_call(
    received: Tensor = WORDS, norms: Tensor = NORMS, means: Tensor = MEANS, numel: int = 100,
    block_size: int = 10, code: Code = CODE, first: int = 0, last: int = 10,
) -> None:  # fmt: skip
    """A valid call, of which each test spoils one argument."""
    ops.requantize(received, norms, means.clone(), numel, block_size, *code, first, last, 0, 0, 0)


def decode_call(
    means: Tensor = MEANS, norms: Tensor = NORMS, out: Tensor = X, block_size: int = 10,
    code: Code = CODE, first: int = 0, last: int = 10,
) -> None:  # fmt: skip
    """The same for the other direction."""
    out = out.clone() if out is X else out
    ops.dequantize_means(means, norms, out, block_size, *code, first, last, 1.0)


def test_the_calls_that_the_errors_below_start_from_are_valid() -> None:
    """Or the tests of errors would say little."""
    requantize_call()
    decode_call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: requantize_call(WORDS.long()), TypeError, "received must be Int, got Long"),
        (lambda: requantize_call(WORDS[:, 1:]), ValueError, ROWS + "[2, 29] with strides [30, 1]"),
        (lambda: requantize_call(WORDS[0]), ValueError, ROWS + "[30] with strides [1]"),
        (lambda: requantize_call(WORDS[:0]), ValueError, ROWS + "[0, 30]"),
        (
            lambda: requantize_call(WORDS.t().contiguous().t()), ValueError,
            ROWS + "[2, 30] with strides [1, 2]",
        ),
        (
            lambda: requantize_call(WORDS[:1].expand(32769, -1)), ValueError,
            "received must be from at most 32768 ranks, got 32769",
        ),
        (lambda: requantize_call(norms=NORMS[1:]), ValueError, "norms must have 10 elements"),
        (lambda: requantize_call(norms=NORMS.float()), TypeError, "norms must be Int, got Float"),
        (lambda: requantize_call(norms=NORMS.long()), TypeError, "means must be Long, got Int"),
        (lambda: requantize_call(means=MEANS[1:]), ValueError, "means must have 40 elements"),
        (lambda: requantize_call(means=MEANS.long()), TypeError, "means must be Int, got Long"),
        (lambda: requantize_call(numel=-1), ValueError, "numel must be at least 0, got -1"),
        (lambda: requantize_call(numel=101), ValueError, "norms must have 11 elements, got 10"),
        (lambda: requantize_call(block_size=0), ValueError, "block_size must be at least 1, got 0"),
        (lambda: requantize_call(code=linear(17, 1)), ValueError, "from 2 to 16, got 17"),
        (lambda: requantize_call(code=linear(8, 128)), ValueError, "from 1 to 127 for linear"),
        (lambda: requantize_call(code=linear(8, -1)), ValueError, "from 1 to 127 for linear"),
        (lambda: requantize_call(code=exponential(7)), ValueError, "bits must be 4 or 8 for exp"),
        (
            lambda: requantize_call(code=Code(EXPONENTIAL, 4, 8)), ValueError,
            "levels must be 7 for exponential codes of 4 bits, got 8",
        ),
        (
            lambda: requantize_call(code=Code(-1, 8, 127)), ValueError,
            "kind must be 0 (linear) or 1 (exponential) or 2 (nearest), got -1",
        ),
        (lambda: requantize_call(first=-1), ValueError, "tiles must be within 0 to 10, got -1 to"),
        (lambda: requantize_call(last=11), ValueError, "tiles must be within 0 to 10, got 0 to 11"),
        (lambda: requantize_call(first=7, last=6), ValueError, "got 7 to 6"),
        (lambda: requantize_call(first=1), ValueError, "a row of 27 words for each rank"),
        (lambda: decode_call(MEANS[1:]), ValueError, "means must have 40 elements, got 39"),
        (lambda: decode_call(MEANS.repeat(2)[::2]), ValueError, "means must be contiguous"),
        (lambda: decode_call(MEANS.float()), TypeError, "means must be Int, got Float"),
        (lambda: decode_call(norms=NORMS[1:]), ValueError, "norms must have 10 elements, got 9"),
        (lambda: decode_call(out=X.double()), TypeError, "norms must be Long, got Int"),
        (lambda: decode_call(out=X.int()), TypeError, "float16, bfloat16, float32 or float64"),
        (lambda: decode_call(out=X.view(10, 10).t()), ValueError, "tensor must be contiguous"),
        (lambda: decode_call(block_size=0), ValueError, "block_size must be at least 1, got 0"),
        (lambda: decode_call(first=3, last=11), ValueError, "within 0 to 10, got 3 to 11"),
        (lambda: decode_call(first=1), ValueError, "means must have 36 elements, got 40"),
        (lambda: decode_call(code=exponential(16)), ValueError, "bits must be 4 or 8 for exp"),
        (lambda: decode_call(code=linear(16, 2**15)), ValueError, "from 1 to 32767 for linear"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], None], error: type[Exception], message: str) -> None:
    """They say what is wrong, what was got, and what is accepted."""
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=name)
@pytest.mark.parametrize("code", [exponential(4), linear(5, 15)], ids=str)
def test_opcheck(dtype: torch.dtype, code: Code) -> None:
    """Schemas tell what is written, and the ops pass through ``torch.compile``."""
    rows = several(np.random.default_rng(0), 0, (2, 1500), dtype)
    shared, words, means, _ = exchange(rows, code, 1024)
    empty = torch.zeros_like(means)
    torch.library.opcheck(ops.requantize, (words, shared, empty, 1500, 1024, *code, 0, 2, 7, 8, 9))
    torch.library.opcheck(
        ops.dequantize_means, (means, shared, torch.zeros_like(rows[0]), 1024, *code, 0, 2, 0.5)
    )
