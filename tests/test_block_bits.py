"""Widths per block: the reference's bits, sizes that follow from the budget, and no bias.

Comparisons for bias would reject an unbiased operator once in 10^9 cases, and there are 12 of them.
Seeds are fixed, so that the file passes always or never.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    as_numpy,
    assert_same,
    bits_of,
    gradient_like,
    instruction_set,
    name,
    several,
    shared_norms,
    spread,
    threshold,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import Group
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, layout, simulate
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench import error
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.reference import block_bits as reference

RNG = np.random.default_rng
LIMIT = threshold(1e-9)
SETTINGS = [
    BlockBits(4),
    BlockBits(2.5, power=1, block_size=64),
    BlockBits(9.3, power=2, max_bits=16, block_size=1024),
    BlockBits(3, power=0, min_bits=3, block_size=96),
]
ADDED = [
    BlockBits(6),
    BlockBits(4.4, power=1, block_size=64),
    BlockBits(9.3, power=2, max_bits=16, block_size=1024),
    BlockBits(7, power=1.5, max_bits=13, block_size=96),
]
"""Those with room for the sum of 5 codes."""


def expected(rows: Tensor, bits: BlockBits, exchange: str = "two_phase", **at: Any) -> Any:
    """What the reference makes of the first tensor of a step."""
    rule = reference.Rule(bits.budget, bits.power, bits.min_bits, bits.max_bits)
    identity = digest((0, 0, rows.shape[1], str(rows.dtype)))
    at = {"correlated": True, "seed": 0, "step": 0, **at}
    mean = reference.mean if exchange == "two_phase" else reference.allreduce_mean
    return mean(as_numpy(rows), rule, block_size=bits.block_size, tensor_id=identity, **at)


@pytest.mark.parametrize(
    ("exchange", "bits"),
    [*(("two_phase", bits) for bits in SETTINGS), *(("allreduce", bits) for bits in ADDED)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_reference(dtype: torch.dtype, exchange: Any, bits: BlockBits) -> None:
    """All kinds of numbers, sizes and ranks, on every instruction set."""
    rng = RNG(0)
    cases = itertools.cycle(itertools.product(["max", "l2"], [True, False], [2, 5, 3]))
    for kind, numel in enumerate((0, 1, 33, 1024, 2500, 3001)):
        rows = several(rng, kind, (3, numel), dtype) if kind < 5 else spread(rng, (4, numel), dtype)
        norm, correlated, n = next(cases)
        at = {"norm": norm, "correlated": correlated, "seed": kind - 2, "step": kind}
        rows = rows[:n].contiguous()
        right = expected(rows, bits, exchange, **at)
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                mean = simulate(rows, bits=bits, exchange=exchange, **at)
                assert_same(mean, right, (isa, numel, at))


def plan_of(
    norms: Tensor, columns: Tensor, blocks: list[int], words: list[int], bits: BlockBits,
    summands: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Native widths and starts."""
    plan = torch.full((2 * len(norms) + 1,), -77, dtype=torch.int32)
    ops.block_widths(norms, columns, blocks, words, *bits.rule(summands), plan)
    return plan[: len(norms)], plan[len(norms) :]


@given(
    st.integers(1, 300), st.sampled_from([torch.float32, torch.float64]), st.floats(0, 2),
    st.integers(2, 16), st.integers(0, 14), st.floats(0, 1), st.integers(1, 9),
    st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_widths(
    count: int, dtype: torch.dtype, power: float, least: int, more: int, share: float,
    summands: int, seed: int,
) -> None:  # fmt: skip
    """They are those of the reference, fit the words, and leave less than a block of those that
    could be wider; a larger norm never has a smaller width, but for what was left over."""
    rng, least = RNG(seed), max(least, (2 * summands).bit_length())
    most = min(least + more, 16)
    bits = BlockBits(least + share * (most - least), power, least, most)
    exponents = rng.normal(0, rng.choice([0, 1, 10, 60]), count)
    norms = torch.from_numpy(np.exp2(exponents) * (rng.random(count) < 0.9)).to(dtype)
    norms[rng.random(count) < 0.02] = torch.inf
    columns = torch.from_numpy(rng.choice([8, 8, 8, 3], count).astype(np.uint8))
    integers = norms.view(layout.norm_dtype(dtype))
    words = bits.words_for(columns.tolist(), summands)
    width, starts = plan_of(integers, columns, [0, count], [0, words], bits, summands)

    rule = reference.Rule(bits.budget, power, least, most)
    numbers = columns.long().numpy()
    right = reference.widths(integers.numpy(), numbers, words, rule, summands)
    assert width.tolist() == right.tolist()
    sizes = torch.from_numpy(reference.words_of(numbers, right, summands))
    assert starts.tolist() == [*([0, *sizes.cumsum(0).tolist()][:-1]), words]
    used = (norms > 0) & norms.isfinite()
    assert (width[~used] == 0).all()
    assert ((least <= width) & (width <= most))[used].all()
    left = words - int(sizes.sum())
    largest_step = 8 if summands == 1 else 48  # from 12 to 16 bits
    few = left < largest_step
    assert left >= 0 and (few or power == 0 or (width[used] == most).all() or left < 8 * count)
    order = norms[used].argsort()
    assert (width[used][order].diff() >= (-1 if summands == 1 else -4)).all()


def test_the_budget_is_spent() -> None:
    """But for less than a block, in each segment, where norms are unlike each other."""
    bits, rng = BlockBits(4.25), RNG(0)
    norms = torch.from_numpy(np.exp2(rng.normal(0, 2, 1000)).astype(np.float32)).view(torch.int32)
    columns = torch.full((1000,), 8, dtype=torch.uint8)
    width, starts = plan_of(norms, columns, [0, 400, 1000], [0, 13_600, 34_000], bits)
    for segment, words in ((slice(0, 400), 13_600), (slice(400, 1000), 20_400)):
        assert words - 8 < 8 * int(width[segment].sum()) <= words
    assert starts[400] == 13_600 and starts[-1] == 34_000
    assert len(width.unique()) > 3


@pytest.mark.parametrize("block_size", [32, 96, 256, 1024])
def test_words_on_the_wire(block_size: int) -> None:
    """Those of the reference at each width, and zeros where no block has any."""
    for width in range(2, 17):
        bits = BlockBits(width, 1, width, width, block_size)
        x = gradient_like(RNG(width), 2 * block_size + 5)
        norms = shared_norms(x[None], block_size, "max")
        norms[1] = 0
        columns = layout.columns_of_blocks(((len(x), block_size),), x.device)
        words = bits.words_for(columns.tolist())
        plan = torch.empty(7, dtype=torch.int32)
        ops.block_widths(norms, columns, [0, 3], [0, words], *bits.rule(), plan)
        out = torch.full((words,), -77, dtype=torch.int32)
        ops.quantize_blocks(
            [x], norms, plan, out, [0, 3], [0, words], block_size, 1, 0, 0, [5], 0, 1, True
        )
        s = (1 << (width - 1)) - 1
        xi = reference.dither(
            len(x), block_size, seed=0, step=0, tensor_id=5, rank=0, world_size=1, correlated=True
        )
        codes = reference.codes(x.numpy(), norms.numpy(), block_size, s, xi, width)
        last = np.zeros(32, np.int64)
        last[:5] = codes[2 * block_size :]
        sent = [reference.pack_block(c + s, width) for c in (codes[:block_size], last)]
        right = np.concatenate([*sent, np.zeros(words - sum(map(len, sent)), np.int32)])
        assert_same(out, right, width)


@pytest.mark.parametrize("bits", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_bytes(dtype: torch.dtype, bits: BlockBits) -> None:
    """To the byte, and within 1 % of the budget and the norms; whatever the gradients are."""
    numels, size = (20_003, 9001, 5000), 3
    for zeros in (False, True):
        group = Group(size, bits=bits)
        rows = [gradient_like(RNG(1), numel, dtype) * (not zeros) for numel in numels]
        group.exchange([[(None, x) for x in rows] for _ in range(size)])
        block = bits.block_size
        sizes = [min(block, numel - i) for numel in numels for i in range(0, numel, block)]
        columns = [-(-each // 32) for each in sizes]
        cuts = [len(sizes) * rank // size for rank in range(size + 1)]
        unit = dtype.itemsize
        words = [
            -(-4 * (round(bits.budget * 1024) * sum(columns[a:b]) // 1024) // unit) * unit
            for a, b in itertools.pairwise(cuts)
        ]
        right = unit * (16 + len(sizes)) + sum(words) // 2
        right += (unit * (size + len(sizes)) + sum(words)) // 2
        for rank in group.ranks:
            assert rank.stats.compressed_bytes_on_wire == right
        double = dtype == torch.float64
        counted = error.wire_bytes(numels, bits=bits, two_phase=True, double=double, ranks=size)
        assert counted == right
        codes = bits.budget * sum(numels) / 8
        norms = unit * (16 + len(sizes)) + unit * (size + len(sizes)) // 2
        assert right == pytest.approx(codes + norms, rel=0.01)


def test_less_error_than_one_width_for_the_same_bytes() -> None:
    rows = spread(RNG(3), (8, 50_000))
    exact = rows.double().mean(0)

    def squares(**options: Any) -> float:
        return float((simulate(rows, exchange="two_phase", **options) - exact).square().sum())

    fixed = squares(bits=4, block_size=256)
    assert squares(bits=BlockBits(4, power=1)) < fixed / 8
    assert squares(bits=BlockBits(4)) < fixed / 4
    # Of one norm in all blocks there is nothing to gain and nothing to lose.
    rows = gradient_like(RNG(4), (4, 256), torch.float32).sign().repeat(1, 20) * 0.3
    rows[:, ::256] = 1
    exact = rows.double().mean(0)
    assert squares(bits=BlockBits(4)) == pytest.approx(squares(bits=4, block_size=256), rel=0.2)


@pytest.mark.parametrize(
    ("exchange", "correlated"), [("two_phase", True), ("two_phase", False), ("allreduce", True)]
)
def test_unbiased(exchange: Any, correlated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of steps, added up in two directions, average out: a test over 64 steps. Rounding to
    nearest fails the same test."""
    rows, bits = spread(RNG(5), (3, 2048)), BlockBits(4)
    exact = rows.double().mean(0).numpy()
    at: dict[str, Any] = {"correlated": correlated, "exchange": exchange}
    fair = np.stack([simulate(rows, step=k, bits=bits, **at).numpy() for k in range(64)]) - exact
    half = np.full(rows.shape[1], 2**31, np.uint32)
    monkeypatch.setattr(reference, "dither", lambda *args, **given: half)
    biased = np.stack([expected(rows, bits, step=k, **at) for k in range(64)]) - exact

    def z(errors: Any, direction: Any) -> float:
        along = errors @ direction
        return float(abs(along.mean()) / max(along.std(ddof=1) / 8, 1e-12))

    # In units of the norm of each element's block, so that no block outweighs all others.
    scale = rows.abs().amax(0).view(-1, 256).amax(1).repeat_interleave(256).double().numpy()
    fair, biased = (each / np.maximum(scale, 1e-30) for each in (fair, biased))
    direction = np.sign(biased.mean(0))
    assert z(fair, direction) < LIMIT
    assert z(fair, np.sign(exact)) < LIMIT
    assert z(biased, direction) > LIMIT


@pytest.mark.parametrize("correlated", [True, False])
@pytest.mark.parametrize(
    ("exchange", "norm"), [("two_phase", "max"), ("two_phase", "l2"), ("allreduce", "max")]
)
def test_errors_are_below_their_bound(exchange: Any, norm: str, correlated: bool) -> None:
    """That of THEORY.md, on the whole; and of the order of it."""
    rows = spread(RNG(9), (4, 20_000))
    exact = rows.double().mean(0)
    for bits in (BlockBits(4), BlockBits(5, power=1, block_size=128)):
        options: Any = {"bits": bits, "norm": norm, "correlated": correlated, "exchange": exchange}
        errors = [simulate(rows, step=k, **options).double() - exact for k in range(8)]
        measured = torch.stack(errors).square().mean(0).sum()
        bound = error.variance_bound(rows, **options).sum()
        assert 0.05 < measured / bound < 1


def test_not_finite_and_zero() -> None:
    """A block that is not finite on one rank is NaN on all, one of zeros stays so, and neither
    takes bits from the others."""
    rows = spread(RNG(6), (2, 4096)) + 1e-3
    rows[:, 1024:2048] = 0
    clean = simulate(rows, bits=BlockBits(4))
    assert (clean[1024:2048] == 0).all()
    rows[1, 1100] = torch.nan
    mean = simulate(rows, bits=BlockBits(4))
    assert mean[1024:1280].isnan().all()
    assert torch.equal(bits_of(mean[:1024]), bits_of(clean[:1024]))
    assert (mean[1280:2048] == 0).all()
    whole = rows.clone()
    whole[:, 1024:2048] = 0.1
    alone, with_more = (
        (simulate(x, bits=BlockBits(4)) - x.mean(0))[:1024].norm() for x in (rows, whole)
    )
    assert alone < with_more


def test_any_message_decodes() -> None:
    """Whatever words and norms another rank has sent, and a plan that fits no message."""
    bits, rng = BlockBits(4), RNG(7)
    x = spread(rng, (1, 3000))[0]
    norms = shared_norms(x[None], 256, "max")
    columns = layout.columns_of_blocks(((3000, 256),), x.device)
    segments = layout.block_segments(((3000, 256),), bits.words_for, torch.int32, 2)
    cut = list(segments.blocks), list(segments.words)
    runs = [[number for run in of_rank for number in run] for of_rank in segments.of_rank]
    plan = torch.empty(2 * len(norms) + 1, dtype=torch.int32)
    ops.block_widths(norms, columns, *cut, *bits.rule(), plan)
    plans = [plan, torch.from_numpy(rng.integers(-(2**31), 2**31, plan.numel()).astype(np.int32))]
    for plan in plans:
        means = []
        for rank in range(2):
            words = segments.words[rank + 1] - segments.words[rank]
            received = torch.from_numpy(rng.integers(-(2**31), 2**31, (2, words)).astype(np.int32))
            own = torch.zeros(segments.means[rank + 1] - segments.means[rank], dtype=torch.int32)
            ops.requantize_blocks(
                received, norms, plan, own, [3000], [0], runs[rank], *cut, rank, 256, 0, 0, [1]
            )
            means.append(own)
        out = torch.full((3000,), -77.0)
        both = runs[0] + runs[1]
        ops.dequantize_blocks(torch.cat(means), norms, plan, [out], [0], both, *cut, 256, 1.0)
        assert (out.abs() <= 1.2 * x.abs().max()).all()
        lie = torch.from_numpy(rng.integers(-(2**31), 2**31, segments.means[-1]).astype(np.int32))
        ops.dequantize_blocks(lie, norms, plan, [out], [0], both, *cut, 256, 1.0)
        ops.quantize_blocks(
            [x], norms, plan, received.new_empty(cut[1][-1]), *cut, 256, 1, 0, 0, [1], 0, 1, True
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norms": torch.zeros(4, dtype=torch.int32)}, "norms must have 3 elements, got 4"),
        ({"plan": torch.zeros(6, dtype=torch.int32)}, "plan must have 7 elements, got 6"),
        ({"words": [0, 9, 8]}, "words must be offsets"),
        ({"blocks": [0, 3]}, "must be offsets of as many segments"),
        ({"words": [0, 8, 2**31]}, "a message must be of at most 2147483647 words"),
        ({"least": 1}, "widths must be from 2 to 16 bits, got 1 to 8"),
        ({"power": 513}, "power must be from 0 to 512"),
        ({"summands": 2}, "summands must leave a level to lanes of 2 bits, got 2"),
    ],
)
def test_arguments_of_the_operator(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "norms": torch.zeros(3, dtype=torch.int32), "columns": torch.ones(3, dtype=torch.uint8),
        "blocks": [0, 1, 3], "words": [0, 4, 8], "power": 128, "least": 2, "most": 8,
        "summands": 1, "plan": torch.zeros(7, dtype=torch.int32),
    }  # fmt: skip
    ops.block_widths(**given)
    with pytest.raises(ValueError, match=message):
        ops.block_widths(**{**given, **change})


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: BlockBits(1), ValueError, "budget must be from min_bits=2 to max_bits=12, got 1"),
        (lambda: BlockBits(BlockBits()), TypeError, "must be a number of bits or DynamicBits(...)"),  # type: ignore[arg-type]
        (lambda: BlockBits(DynamicBits(14)), ValueError, "to max_bits=12, got DynamicBits(budget="),
        (lambda: BlockBits(DynamicBits(4, max_bits=4), min_bits=5), ValueError, "min_bits=5 to"),
        (lambda: DynamicBits(BlockBits()), TypeError, "pass BlockBits(DynamicBits(...))"),  # type: ignore[arg-type]
        (lambda: BlockBits("4"), TypeError, "budget must be a number of bits or Dy"),  # type: ignore[arg-type]
        (lambda: BlockBits(power=3), ValueError, "power must be from 0 to 2, got 3"),
        (lambda: BlockBits(block_size=100), ValueError, "must be a multiple of 32 for widths per"),
        (lambda: BlockBits(block_size=2048), ValueError, "block_size must be from 32 to 1024"),
        (lambda: Options(bits=BlockBits(), dither="exponential"), ValueError,
         "bits must be 4 or 8 for dither='exponential', got BlockBits("),
        (lambda: Options(bits=BlockBits(), block_size=64), ValueError,
         "pass BlockBits(block_size=64)"),
    ],
)  # fmt: skip
def test_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        make()


def test_options() -> None:
    compressor = GlobalQSGD(bits=BlockBits(4))
    assert compressor.options.block_size == 256
    assert compressor.options.exchange_for(2) == "two_phase"
    assert "levels per side: 1 to 2047" in compressor.options.describe(8)
    summed = Options(bits=BlockBits(8), exchange="allreduce")
    assert summed.describe(4) == "allreduce on 4 ranks, levels per side: 1 to 511"
    assert Options(bits=BlockBits(4)) == Options(bits=BlockBits(4.0), block_size=256)
    digests = {Options(bits=bits).digest() for bits in (4, *SETTINGS, BlockBits(4, power=1))}
    assert len(digests) == len(SETTINGS) + 2


def test_ranks_must_have_the_same_rule() -> None:
    options = [{"bits": BlockBits(4)}, {"bits": BlockBits(4, power=1)}]
    x = gradient_like(RNG(0), 5000)
    errors = Group(2, options=options).errors([[(None, x)], [(None, x)]])
    assert all("the ranks use different options" in text for text in errors)


def test_buckets() -> None:
    """A tensor of a bucket has widths that its neighbours take part in, and the same mean on all
    ranks; widths of a tensor alone are those of ``simulate``."""
    rows = [spread(RNG(8), (3, numel)) for numel in (5000, 1, 0, 700)]
    named = [[(str(i), x[rank].contiguous()) for i, x in enumerate(rows)] for rank in range(3)]
    means = Group(3, bits=BlockBits(4)).exchange(named)
    for i, x in enumerate(rows):
        assert all(torch.equal(of_rank[i], means[0][i]) for of_rank in means)
        assert (means[0][i] - x.mean(0)).norm() <= 0.5 * x.mean(0).norm()
