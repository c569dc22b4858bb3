"""The kernels for GPUs give the bits of those for the CPU, and write nowhere else.

They run on a GPU, where there is one, and everywhere on emulated threads; see ``emulated_cuda``.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    TWO_PHASE_CODES,
    WIDTHS,
    name,
    random_place,
    same_bits,
    several,
    special_values,
)
from torch import Tensor

from hvd_gqsgd import BlockBits, layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.reference.kinds import LINEAR, Code, exponential, linear, nearest
from hvd_gqsgd.reference.linear import levels

pytestmark = pytest.mark.launches

BLOCKS = [256, 1000, 1024, 1500, 2048, None]
SIZES = [0, 1, 3, 255, 1025, 4096, 5003]
# Emulated threads are slow, and small blocks take one or more for each block.
SHAPES = [*itertools.product(BLOCKS, SIZES), (1, 70), (7, 300), (16, 1024)]
CODES = [
    *(linear(bits, 1) for bits in WIDTHS), exponential(4), exponential(8), nearest(4, 7),
    nearest(5, 15),
]  # fmt: skip
MARGIN = 64  # elements around a buffer


class Gpu(NamedTuple):
    """Where the kernels run."""

    ops: Any
    device: str


@pytest.fixture(
    scope="module", params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)]
)  # fmt: skip
def gpu(request: pytest.FixtureRequest) -> Gpu:
    """A GPU, or what stands in for one."""
    if request.param == "cuda":
        return Gpu(torch.ops.hvd_gqsgd, "cuda")
    from emulated_cuda.build import load_kernels

    load_kernels(request.config.cache.mkdir("emulated-cuda"))
    return Gpu(torch.ops.hvd_gqsgd_emulated, "cpu")


class Buffer:
    """Memory on the device, with margins that must stay as they are."""

    def __init__(self, gpu: Gpu, numel: int, dtype: torch.dtype, offset: int = 0) -> None:
        self._memory = torch.full((numel + 2 * MARGIN,), 77, dtype=dtype, device=gpu.device)
        self._begin = MARGIN + offset
        self.view = self._memory[self._begin : self._begin + numel]

    def assert_same(self, expected: Tensor, what: object) -> None:
        """The bits of a tensor on the CPU, and nothing around them."""
        assert same_bits(self.view.cpu(), expected), what
        before, after = self._memory[: self._begin], self._memory[self._begin + len(expected) :]
        assert (before == 77).all() and (after == 77).all(), what


def on_device(gpu: Gpu, x: Tensor, offset: int) -> Tensor:
    """A copy that begins ``offset`` elements after an aligned address."""
    memory = torch.empty(x.numel() + offset, dtype=x.dtype, device=gpu.device)
    return memory[offset:].copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_norms(gpu: Gpu, dtype: torch.dtype) -> None:
    """Largest magnitudes, sums of squares and L2 norms."""
    rng = np.random.default_rng(0)
    kinds = itertools.cycle(range(5))
    for block_size, numel in SHAPES:
        kind = next(kinds)
        x = several(rng, kind, (1, numel), dtype)[0]
        block, offset = block_size or max(numel, 1), int(rng.integers(0, 3))
        what = (block_size, numel, kind, offset)
        norms = torch.empty(-(-numel // block), dtype=layout.norm_dtype(dtype))
        squares = torch.empty(norms.numel(), dtype=torch.int64)
        l2_norms = norms.clone()
        ops.block_max(x, block, norms)
        ops.block_squares(x, norms, squares, block)
        l2_norms.copy_(norms)
        ops.l2_norms(l2_norms, squares)

        given = on_device(gpu, x, offset)
        found = Buffer(gpu, norms.numel(), norms.dtype)
        gpu.ops.block_max(given, block, found.view)
        found.assert_same(norms, what)
        sums = Buffer(gpu, norms.numel(), torch.int64)
        gpu.ops.block_squares(given, found.view, sums.view, block)
        sums.assert_same(squares, what)
        gpu.ops.l2_norms(found.view, sums.view)
        found.assert_same(l2_norms, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_places_of_the_largest(gpu: Gpu, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    for kind, (block, numel) in enumerate(
        [(4, 70), (33, 1000), (256, 1025), (1000, 5003), (9, 0), (65_536, 70_000)]
    ):
        x = several(rng, kind, (1, numel), dtype)[0]
        x[: numel // 2] = x[: numel // 2].round()  # ties
        bytes_ = torch.uint8 if block <= 256 else torch.int16
        expected = torch.empty(-(-numel // block), dtype=bytes_)
        ops.block_argmax(x, block, expected)
        found = Buffer(gpu, expected.numel(), bytes_)
        gpu.ops.block_argmax(on_device(gpu, x, kind % 3), block, found.view)
        found.assert_same(expected, (block, numel))


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_codes(gpu: Gpu, dtype: torch.dtype, code: Code) -> None:
    """Elements to words, and sums of words back."""
    bits, added = code.bits, code.kind == LINEAR
    rng = np.random.default_rng(bits)
    kinds = itertools.cycle(range(5))
    for block_size, numel in SHAPES:
        ranks = int(rng.integers(1, min(4, 2 ** (bits - 1))))
        if added:
            code = linear(bits, levels(bits, ranks))
        kind, offset = next(kinds), int(rng.integers(0, 3))
        rows = several(rng, kind, (ranks, numel), dtype)
        block, what = block_size or max(numel, 1), (block_size, numel, ranks, kind, offset)
        norms = torch.empty(ranks, -(-numel // block), dtype=layout.norm_dtype(dtype))
        for row, norm in zip(rows, norms, strict=True):
            ops.block_max(row, block, norm)
        norms = norms.amax(0)
        total = torch.zeros(layout.words_for(numel, block, bits), dtype=layout.word_dtype(bits))
        for rank, x in enumerate(rows):
            place = random_place(rng, rank, ranks, kind % 2 == 0).values()
            words = torch.empty_like(total)
            ops.quantize(x, norms, words, block, *code, *place)
            found = Buffer(gpu, words.numel(), words.dtype, offset)
            given = on_device(gpu, x, offset), norms.to(gpu.device)
            gpu.ops.quantize(*given, found.view, block, *code, *place)
            found.assert_same(words, what)
            total += words
        if not added:
            continue
        mean = torch.empty(numel, dtype=dtype)
        ops.dequantize(total, norms, mean, block, *code, ranks, 1 / ranks)
        decoded = Buffer(gpu, numel, dtype, offset)
        summed = on_device(gpu, total, offset), norms.to(gpu.device)
        gpu.ops.dequantize(*summed, decoded.view, block, *code, ranks, 1 / ranks)
        decoded.assert_same(mean, what)


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_two_phase(gpu: Gpu, dtype: torch.dtype, code: Code) -> None:
    """Means of what ranks have sent, rounded once more, for any run of tiles; and back."""
    bits = code.bits
    rng = np.random.default_rng(bits)
    norm_dtype, word_dtype = layout.norm_dtype(dtype), layout.word_dtype(bits)
    for block_size, numel in SHAPES:
        ranks = int(rng.integers(1, 4))
        block = block_size or max(numel, 1)
        tiles = layout.tiles_for(numel, block)
        first, last = sorted(int(t) for t in rng.integers(0, tiles + 1, 2))
        what, offset = (block_size, numel, ranks, first, last), int(rng.integers(0, 3))
        # From a peer anything may come.
        low, high = torch.iinfo(word_dtype).min, torch.iinfo(word_dtype).max
        before, after = (layout.words_before(t, numel, block, bits) for t in (first, last))
        received = torch.from_numpy(
            rng.integers(low, high, (ranks, after - before), dtype=str(word_dtype)[6:])
        )
        norms = torch.empty(-(-numel // block), dtype=norm_dtype)
        ops.block_max(several(rng, 4, (1, numel), dtype)[0], block, norms)
        begin, end = (layout.means_before(t, numel, block, bits, norm_dtype) for t in (first, last))
        means = torch.empty(end - begin, dtype=layout.means_dtype(bits, norm_dtype))
        at = list(random_place(rng, 0, 1, True).values())[:3]
        ops.requantize(received, norms, means, numel, block, *code, first, last, *at)
        found = Buffer(gpu, means.numel(), means.dtype)
        given = received.to(gpu.device), norms.to(gpu.device)
        gpu.ops.requantize(*given, found.view, numel, block, *code, first, last, *at)
        found.assert_same(means, what)

        out = torch.full((numel,), 77, dtype=dtype)
        ops.dequantize_means(means, norms, out, block, *code, first, last, 0.5)
        decoded = Buffer(gpu, numel, dtype, offset)
        gpu.ops.dequantize_means(found.view, given[1], decoded.view, block, *code, first, last, 0.5)
        decoded.assert_same(out, what)


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_one_phase(gpu: Gpu, dtype: torch.dtype, code: Code) -> None:
    """Sums of what ranks have sent, in rows that may lie apart."""
    rng, word_dtype = np.random.default_rng(code.bits), layout.word_dtype(code.bits)
    low, high = torch.iinfo(word_dtype).min, torch.iinfo(word_dtype).max
    for block_size, numel in SHAPES:
        block, ranks, gap = block_size or max(numel, 1), *(int(n) for n in rng.integers(1, 4, 2))
        count, offset = layout.words_for(numel, block, code.bits), int(rng.integers(0, 3))
        rows = rng.integers(low, high, (ranks, gap + count), dtype=str(word_dtype)[6:])
        received = torch.from_numpy(rows)
        norms = torch.empty(-(-numel // block), dtype=layout.norm_dtype(dtype))
        ops.block_max(several(rng, 4, (1, numel), dtype)[0], block, norms)
        out, found = torch.full((numel,), 77, dtype=dtype), Buffer(gpu, numel, dtype, offset)
        ops.sum_codes(received[:, gap:], norms, out, block, *code, 0.5)
        given = received.to(gpu.device)[:, gap:], norms.to(gpu.device)
        gpu.ops.sum_codes(*given, found.view, block, *code, 0.5)
        found.assert_same(out, (block_size, numel, ranks))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_widths_per_block(gpu: Gpu, dtype: torch.dtype) -> None:
    """Widths, codes at these widths, their means, whatever ranks have sent, and back."""
    rng, norm_dtype = np.random.default_rng(0), layout.norm_dtype(dtype)
    for i, (block, numel) in enumerate([(256, 5003), (96, 1500), (1024, 2060), (32, 3), (256, 0)]):
        bits = BlockBits(2.5 + i, power=0.5 * (i % 4), max_bits=16, block_size=block)
        x = several(rng, i, (1, numel), dtype)[0]
        what, place = (block, numel), list(random_place(rng, 1, 2, True).values())
        tensors = ((numel, block),)
        segments = layout.block_segments(tensors, bits.words_for, norm_dtype, 2)
        cut = segments.blocks, segments.words
        runs = [number for run in segments.of_rank[1] for number in run]
        norms = torch.empty(segments.blocks[-1], dtype=norm_dtype)
        ops.block_max(x, block, norms)
        columns = layout.columns_of_blocks(tensors, x.device)
        received = torch.from_numpy(
            rng.integers(-(2**31), 2**31, (3, cut[1][2] - cut[1][1])).astype(np.int32)
        )
        results: list[list[Buffer | Tensor]] = []
        for lib, device in ((ops, "cpu"), gpu):
            at = Gpu(lib, device)
            buffers = [
                Buffer(at, 2 * len(norms) + 1, torch.int32), Buffer(at, cut[1][-1], torch.int32),
                Buffer(at, segments.means[2] - segments.means[1], norm_dtype),
                Buffer(at, numel, dtype, int(rng.integers(0, 3))),
            ]  # fmt: skip
            plan, words, means, out = (buffer.view for buffer in buffers)
            n, given = norms.to(device), x.to(device)
            lib.block_widths(n, columns.to(device), *cut, *bits.rule(), plan)
            lib.quantize_blocks(
                [given], n, plan, words, *cut, block, 1, *place[:2], [7], 1, 2, True, numel % 2 == 1
            )
            lib.requantize_blocks(
                received.to(device), n, plan, means, [numel], [0], runs, *cut, 1, block,
                *place[:2], [7],
            )  # fmt: skip
            means[:1] = 1
            whole = means.new_zeros(segments.means[2])
            whole[segments.means[1] :] = means
            both = [number for run in segments.of_tensor[0] for number in run]
            lib.dequantize_blocks(whole, n, plan, [out], [0], both, *cut, block, 0.5)
            results.append([*buffers] if at.ops is gpu.ops else [b.view for b in buffers])
        for found, expected in zip(results[1], results[0], strict=True):
            assert isinstance(found, Buffer) and isinstance(expected, Tensor)
            found.assert_same(expected, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_widths_per_block_in_one_phase(gpu: Gpu, dtype: torch.dtype) -> None:
    """Sums of what ranks have sent, for the second of two tensors, with a segment each."""
    rng, norm_dtype = np.random.default_rng(1), layout.norm_dtype(dtype)
    for block, numel in [(256, 2503), (96, 1500), (1024, 2060), (32, 3)]:
        bits, tensors = BlockBits(3, block_size=block), ((numel, block),) * 2
        segments = layout.block_segments(tensors, bits.words_for, norm_dtype, 2)
        cut = segments.blocks, segments.words
        norms = torch.empty(segments.blocks[-1], dtype=norm_dtype)
        ops.block_max_each(list(several(rng, 4, (2, numel), dtype)), block, norms)
        plan = torch.empty(2 * len(norms) + 1, dtype=torch.int32)
        columns = layout.columns_of_blocks(tensors, norms.device)
        ops.block_widths(norms, columns, *cut, *bits.rule(), plan)
        received = torch.from_numpy(
            rng.integers(-(2**31), 2**31, (3, cut[1][2] - cut[1][1])).astype(np.int32)
        )
        out, found = torch.full((numel,), 77, dtype=dtype), Buffer(gpu, numel, dtype, 1)
        place = segments.blocks[1], *cut, 1, block, 1, 1, 0.5
        ops.sum_blocks(received, norms, plan, out, *place)
        given = [x.to(gpu.device) for x in (received, norms, plan)]
        gpu.ops.sum_blocks(*given, found.view, *place)
        found.assert_same(out, (block, numel))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_widths_per_block_that_are_added(gpu: Gpu, dtype: torch.dtype) -> None:
    """Widths, words that ranks may add, and any sum of these, back."""
    rng, norm_dtype = np.random.default_rng(2), layout.norm_dtype(dtype)
    for i, (block, numel) in enumerate([(256, 5003), (96, 1500), (1024, 2060), (32, 3), (256, 0)]):
        n = 2 + 2 * i
        bits = BlockBits(6 + i, power=0.5 * i, max_bits=16, block_size=block)
        x = several(rng, i, (1, numel), dtype)[0]
        tensors, place = ((numel, block),), list(random_place(rng, 1, n, True).values())
        segments = layout.block_segments(tensors, bits.words_for, norm_dtype, 1, n)
        cut = segments.blocks, segments.words
        norms = torch.empty(segments.blocks[-1], dtype=norm_dtype)
        ops.block_max(x, block, norms)
        columns = layout.columns_of_blocks(tensors, x.device)
        sums = torch.from_numpy(rng.integers(-(2**31), 2**31, (1, cut[1][-1])).astype(np.int32))
        results: list[list[Buffer]] = []
        for lib, device in ((ops, "cpu"), gpu):
            at = Gpu(lib, device)
            plan = Buffer(at, 2 * len(norms) + 1, torch.int32)
            words = Buffer(at, cut[1][-1] // 2, torch.int64)
            out = Buffer(at, numel, dtype, 1)
            n_, given = norms.to(device), x.to(device)
            lib.block_widths(n_, columns.to(device), *cut, *bits.rule(n), plan.view)
            lib.quantize_blocks(
                [given], n_, plan.view, words.view.view(torch.int32), *cut, block, n, *place[:2],
                [7], 1, n, True,
            )  # fmt: skip
            lib.sum_blocks(
                sums.to(device), n_, plan.view, out.view, 0, *cut, 0, block, n, n - 1, 0.5
            )
            results.append([plan, words, out])
        for found, expected in zip(results[1], results[0], strict=True):
            found.assert_same(expected.view, (block, numel))


@pytest.mark.parametrize("bits", [4, 8])
def test_combine(gpu: Gpu, bits: int) -> None:
    """Two ranks' exponential codes become one."""
    rng = np.random.default_rng(bits)
    for numel, offset in itertools.product((0, 1, 15, 16, 17, 4096, 5000), (0, 1, 8)):
        a, b = (torch.from_numpy(rng.integers(0, 256, numel, dtype=np.uint8)) for _ in range(2))
        key = int(rng.integers(-(2**63), 2**63 - 1))
        found = Buffer(gpu, numel, torch.uint8, offset)
        found.view.copy_(b)
        gpu.ops.combine(on_device(gpu, a, offset), found.view, bits, key)
        ops.combine(a, b, bits, key)
        found.assert_same(b, (numel, offset))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_sum_of_squares(gpu: Gpu, dtype: torch.dtype) -> None:
    """Added up in the same order."""
    rng = np.random.default_rng(0)
    for numel in (0, 1, 15, 17, 4095, 4096, 4097, 70_001):
        x = several(rng, 0, (1, numel), dtype)[0]
        found = torch.empty((), dtype=torch.float64, device=gpu.device)
        gpu.ops.sum_of_squares(x.to(gpu.device), found)
        assert same_bits(found.cpu(), ops.sum_of_squares(x))


def test_special_values(gpu: Gpu) -> None:
    """All halves there are, and the edges of the other types."""
    for dtype in DTYPES:
        x = special_values(dtype)
        norms = torch.empty(-(-x.numel() // 256), dtype=layout.norm_dtype(dtype))
        ops.block_max(x, 256, norms)
        words = torch.empty(layout.words_for(x.numel(), 256, 8), dtype=torch.int32)
        mean = torch.empty_like(x)
        place, code = (5, 6, 7, 0, 1, True), linear(8, 127)
        ops.quantize(x, norms, words, 256, *code, *place)
        ops.dequantize(words, norms, mean, 256, *code, 1, 3.0)
        given = x.to(gpu.device)
        found = [t.to(gpu.device) for t in map(torch.zeros_like, (norms, words, mean))]
        gpu.ops.block_max(given, 256, found[0])
        gpu.ops.quantize(given, found[0], found[1], 256, *code, *place)
        gpu.ops.dequantize(found[1], found[0], found[2], 256, *code, 1, 3.0)
        for a, b in zip(found, (norms, words, mean), strict=True):
            assert same_bits(a.cpu(), b), dtype
