"""The operators on all tensors of a bucket do what those on one tensor do, and refuse the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import bits_of
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.layout import FLAG, lay_out, norm_dtype, runs

NUMELS = [5000, 0, 1, 1024, 3001]
IDENTITIES = [7, 8, 9, 10, 2**31 - 1]
LINEAR, LEVELS, SEED, STEP = 0, 60, 3, 5


def tensors(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]


def sizes(block_size: int | None) -> tuple[tuple[int, int], ...]:
    return tuple((n, block_size or max(n, 1)) for n in NUMELS)


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("block_size", [1024, 300, 4096, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_as_one_by_one(bits: int, block_size: int | None, dtype: torch.dtype) -> None:
    layout = lay_out(sizes(block_size), bits, norm_dtype(dtype))
    xs, levels = tensors(dtype), (1 << bits) // 4 - 1
    code = (LINEAR, bits, levels)
    norms = torch.empty(layout.num_norms, dtype=layout.norm_dtype)
    words = torch.empty(layout.num_words, dtype=layout.word_dtype)
    expected_norms, expected_words = torch.empty_like(norms), torch.empty_like(words)
    ops.block_max_each(xs, block_size, norms)
    ops.quantize_each(xs, norms, words, block_size, *code, SEED, STEP, IDENTITIES, 1, 2, True)
    for i, (x, (_, block)) in enumerate(zip(xs, layout.tensors, strict=True)):
        norm, word = expected_norms[layout.norms[i]], expected_words[layout.words[i]]
        ops.block_max(x, block, norm)
        ops.quantize(x, norm, word, block, *code, SEED, STEP, IDENTITIES[i], 1, 2, True)
    assert torch.equal(norms, expected_norms)
    assert torch.equal(words, expected_words)

    some = [3, 0, 4]  # in any order
    outs, expected = ([torch.empty_like(xs[i]) for i in some] for _ in range(2))
    starts = [[place[i].start for i in some] for place in (layout.words, layout.norms)]
    ops.dequantize_each(words, norms, outs, *starts, block_size, *code, 1, 0.5)
    for i, out, one in zip(some, outs, expected, strict=True):
        word, norm = words[layout.words[i]], norms[layout.norms[i]]
        ops.dequantize(word, norm, one, layout.tensors[i][1], *code, 1, 0.5)
        assert torch.equal(bits_of(out), bits_of(one))


@pytest.mark.parametrize("block_size", [1024, 300, None])
@pytest.mark.parametrize(("kind", "bits"), [(0, 8), (0, 5), (1, 4)])
def test_means_as_one_by_one(kind: int, bits: int, block_size: int | None) -> None:
    ranks, code = 3, (kind, bits, (1 << bits - 1) - 1)
    layout = lay_out(sizes(block_size), bits, torch.int32)
    segments = layout.segments(ranks)
    xs, norm_starts = tensors(torch.float32), [place.start for place in layout.norms]
    norms = torch.empty(layout.num_norms, dtype=torch.int32)
    words = torch.empty(layout.num_words, dtype=layout.word_dtype)
    ops.block_max_each(xs, block_size, norms)
    ops.quantize_each(xs, norms, words, block_size, *code, SEED, STEP, IDENTITIES, 0, 1, False)
    means = torch.zeros(segments.means[-1], dtype=layout.means_dtype)
    expected = means.clone()
    begins = [0, *itertools.accumulate(segments.words)]
    for rank, parts in enumerate(segments.of_rank):
        received = words[begins[rank] : begins[rank + 1]].repeat(ranks, 1)
        own = means[segments.means[rank] : segments.means[rank + 1]]
        ops.requantize_each(
            received, norms, own, NUMELS, norm_starts,
            runs((part.tensor, part) for part in parts), segments.means[rank],
            block_size, *code, SEED, STEP, IDENTITIES,
        )  # fmt: skip
        for part in parts:
            i, (numel, block) = part.tensor, layout.tensors[part.tensor]
            ops.requantize(
                received[:, part.words], norms[layout.norms[i]], expected[part.means],
                numel, block, *code, *part.tiles, SEED, STEP, IDENTITIES[i],
            )  # fmt: skip
    assert torch.equal(means, expected)
    assert means[FLAG:].any()

    some = [4, 0]
    outs, singly = ([torch.zeros(NUMELS[i]) for i in some] for _ in range(2))
    parts = [(j, part) for j, i in enumerate(some) for part in segments.of_tensor[i]]
    starts = [norm_starts[i] for i in some]
    ops.dequantize_means_each(means, norms, outs, starts, runs(parts), block_size, *code, 2.0)
    for j, part in parts:
        i = some[j]
        ops.dequantize_means(
            means[part.means], norms[layout.norms[i]], singly[j], layout.tensors[i][1], *code,
            *part.tiles, 2.0,
        )  # fmt: skip
    assert all(torch.equal(out, one) for out, one in zip(outs, singly, strict=True))
    assert all(out.any() for out in outs)


# --- arguments with which a kernel would leave its tensors ----------------------------------------

XS = [torch.ones(100), torch.ones(50)]
NORMS, WORDS = torch.ones(2, dtype=torch.int32), torch.zeros(38, dtype=torch.int32)
MEANS = torch.zeros(40, dtype=torch.int32)
CODE = (LINEAR, 8, LEVELS)


def maxima(xs: Any = XS, block_size: Any = None, norms: Tensor = NORMS) -> None:
    """A valid call, of which each test spoils one argument; so are the others."""
    ops.block_max_each(xs, block_size, norms.clone())


def quantize(norms: Tensor = NORMS, words: Tensor = WORDS, ids: Any = (1, 2)) -> None:
    ops.quantize_each(XS, norms, words.clone(), None, *CODE, 0, 0, ids, 0, 2, True)


def dequantize(words: Any = (0, 25), norms: Any = (0, 1), message: Tensor = WORDS) -> None:
    outs = [torch.empty(100), torch.empty(50)]
    ops.dequantize_each(message, NORMS, outs, words, norms, None, *CODE, 2, 1.0)


def requantize(run: Any = (0, 0, 1, 1), rows: int = 25, begin: int = 0, ids: Any = (1, 2)) -> None:
    received = torch.zeros(2, rows, dtype=torch.int32)
    ops.requantize_each(
        received, NORMS, MEANS.clone(), [100, 50], [0, 1], run, begin, None, *CODE, 0, 0, ids
    )


def means(run: Any = (0, 0, 1, 1), norms: Any = (0, 1)) -> None:
    outs = [torch.empty(100), torch.empty(50)]
    ops.dequantize_means_each(MEANS, NORMS, outs, norms, run, None, *CODE, 1.0)


def test_the_calls_that_the_errors_below_start_from_are_valid() -> None:
    for call in (maxima, quantize, dequantize, requantize, means):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maxima(block_size=0), "block_size must be at least 1, got 0"),
        (lambda: maxima(norms=NORMS[:1]), "norms has 1 elements, and a tensor's 1 begin at 1"),
        (lambda: maxima(norms=NORMS.view(1, 2)), "norms must have one dimension, got 2"),
        (lambda: quantize(norms=NORMS[:1]), "norms has 1 elements"),
        (
            lambda: quantize(words=WORDS[:37]),
            "words has 37 elements, and a tensor",
        ),
        (lambda: quantize(ids=(1,)), "tensor_ids must have a number for each of 2 tensors, got 1"),
        (lambda: dequantize(words=(0,)), "word_starts must have a number for each of 2 tensors"),
        (lambda: dequantize(norms=(0,)), "norm_starts must have a number for each of 2 tensors"),
        (lambda: dequantize(words=(0, 26)), "a tensor's 13 begin at 26"),
        (
            lambda: dequantize(words=(-1, 25)),
            "words has 38 elements, and a tensor's 25 begin at -1",
        ),
        (lambda: dequantize(norms=(0, 2)), "norms has 2 elements, and a tensor's 1 begin at 2"),
        (lambda: dequantize(words=(0, 2**63 - 1)), "a tensor's 13 begin at 9223372036854775807"),
        (lambda: requantize(run=(2, 0, 1, 1)), "a run must be of one of 2 tensors, got 2"),
        (lambda: requantize(run=(-1, 0, 1, 1)), "a run must be of one of 2 tensors, got -1"),
        (lambda: requantize(run=(0, 0, 1)), "runs must be 4 numbers each, got 3"),
        (lambda: requantize(run=(0, 0, 2, 1)), "tiles must be within 0 to 1, got 0 to 2"),
        (lambda: requantize(run=(0, 0, 1, 15)), "means has 40 elements"),
        (lambda: requantize(begin=2), "means has 40 elements, and a tensor's 26 begin at -1"),
        (lambda: requantize(rows=24), "received has 24 words of each rank"),
        (lambda: requantize(ids=(1,)), "tensor_ids must have a number for each of 2 tensors"),
        (lambda: means(run=(0, 1, 0, 1)), "tiles must be within 0 to 1, got 1 to 0"),
        (lambda: means(run=(0, 0, 1, -1)), "means has 40 elements, and a tensor's 26 begin at -1"),
        (lambda: means(norms=(2, 1)), "norms has 2 elements, and a tensor's 1 begin at 2"),
    ],
)
def test_errors(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
