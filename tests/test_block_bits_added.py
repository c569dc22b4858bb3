"""Widths per block whose codes are added, and budgets that change from step to step.

``test_block_bits.py`` has the comparison with the reference, for these too.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_same, gradient_like, name, shared_norms, spread
from simulated_ranks import Group

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench import error
from hvd_gqsgd.reference import block_bits as reference

RNG = np.random.default_rng
STEPS = 24
ADDED = [BlockBits(6), BlockBits(9.3, power=2, max_bits=16, block_size=1024)]


@pytest.mark.parametrize("block_size", [32, 96, 256, 1024])
def test_words_that_are_added(block_size: int) -> None:
    """Those of the reference at each width. Words of ranks at the ends of their lanes add up
    without a signed overflow, and decode."""
    for width in range(3, 17):
        n = min(((1 << width) - 1) // 2, 7)
        bits = BlockBits(width, 1, width, width, block_size)
        x = gradient_like(RNG(width), 2 * block_size + 5)
        norms = shared_norms(x[None], block_size, "max")
        columns = layout.columns_of_blocks(((len(x), block_size),), x.device)
        words = bits.words_for(columns.tolist(), n)
        plan = torch.empty(7, dtype=torch.int32)
        ops.block_widths(norms, columns, [0, 3], [0, words], *bits.rule(n), plan)
        cut = [0, 3], [0, words]
        s, used = ((1 << width) - 1) // (2 * n), int(plan[0])
        assert used == width
        total, codes = np.zeros(words // 2, object), np.zeros(len(x), np.int64)
        for rank in range(n):
            own = x * (-1) ** rank if rank < n - 2 else x  # 2 or 3 more ranks at one end
            out = torch.full((words // 2,), -77, dtype=torch.int64)
            ops.quantize_blocks(
                [own], norms, plan, out.view(torch.int32), *cut, block_size, n, 0, 0, [5], rank, n,
                True,
            )  # fmt: skip
            xi = reference.dither(
                len(x), block_size, seed=0, step=0, tensor_id=5, rank=rank, world_size=n,
                correlated=True,
            )  # fmt: skip
            c = reference.codes(own.numpy(), norms.numpy(), block_size, s, xi, width)
            edges = range(0, len(x), block_size)
            parts = [c[i : i + block_size] + s for i in edges]
            sent = [
                reference.pack_added(part, int(q), width, s)
                for part, q in zip(parts, columns, strict=True)
            ]
            assert_same(out, np.concatenate([*sent, np.zeros(0, np.int64)]), width)
            total += out.numpy().astype(object)
            codes += c
        assert all(-(2**63) <= int(word) < 2**63 for word in total)
        decoded = torch.empty(len(x))
        summed = torch.from_numpy(total.astype(np.int64)).view(torch.int32)[None]
        ops.sum_blocks(summed, norms, plan, decoded, 0, *cut, 0, block_size, n, n, float(s))
        grid = norms.view(torch.float32).repeat_interleave(block_size)[: len(x)]
        assert torch.equal(decoded, torch.from_numpy(codes).float() * grid)


@pytest.mark.parametrize("bits", ADDED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_bytes_of_an_allreduce(dtype: torch.dtype, bits: BlockBits) -> None:
    """To the byte, and within 1 % of the budget, the norms and the marks."""
    numels = (20_003, 9001, 5000)
    for size, zeros in itertools.product((2, 3, 5), (False, True)):
        group = Group(size, bits=bits, exchange="allreduce")
        rows = [gradient_like(RNG(1), numel, dtype) * (not zeros) for numel in numels]
        group.exchange([[(None, x) for x in rows] for _ in range(size)])
        double = dtype == torch.float64
        right = error.wire_bytes(numels, bits=bits, double=double, ranks=size)
        for rank in group.ranks:
            assert rank.stats.compressed_bytes_on_wire == right
        blocks = sum(-(-numel // bits.block_size) for numel in numels)
        fixed = dtype.itemsize * (16 + blocks) + 8 * 16
        assert right == pytest.approx(bits.budget * sum(numels) / 8 + fixed, rel=0.01)


def test_a_budget_below_the_narrowest_lanes(caplog: pytest.LogCaptureFixture) -> None:
    """On 8 ranks lanes have 5 bits, of which a word of 64 has 12."""
    x = gradient_like(RNG(1), 25_600)
    group = Group(8, bits=BlockBits(5), exchange="allreduce")
    (mean,) = group.exchange([[(None, x)]] * 8)[0]
    assert group.ranks[0].stats.mean_bits == pytest.approx(5.5 + 32 / 256, rel=0.02)
    assert (mean - x).norm() < x.norm()
    assert "a budget of 5 bits cannot be held: the sum over 8 ranks takes lanes of 5.33" in (
        caplog.text
    )
    with pytest.raises(ValueError, match="bits=4 is too narrow for 8 ranks"):
        Group(8, bits=BlockBits(4), exchange="allreduce").submit([[(None, x)]] * 8)


def test_any_sum_decodes() -> None:
    """Whatever words the ranks have summed, and a plan that fits no message."""
    rng, x = RNG(8), spread(RNG(7), (1, 3000))[0]
    bits, norms = BlockBits(6), shared_norms(x[None], 256, "max")
    columns = layout.columns_of_blocks(((3000, 256),), x.device)
    segments = layout.block_segments(((3000, 256),), bits.words_for, torch.int32, 1, 5)
    cut = list(segments.blocks), list(segments.words)
    plan = torch.empty(2 * len(norms) + 1, dtype=torch.int32)
    ops.block_widths(norms, columns, *cut, *bits.rule(5), plan)
    lie = torch.from_numpy(rng.integers(-(2**31), 2**31, plan.numel()).astype(np.int32))
    words = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, cut[1][-1] // 2))
    out = torch.full((3000,), -77.0)
    for places in (plan, lie):
        row = words.view(torch.int32)[None]
        ops.sum_blocks(row, norms, places, out, 0, *cut, 0, 256, 5, 3, 1 / 3)
        assert (out.abs() <= 12 * x.abs().max()).all()
        ops.quantize_blocks(
            [x], norms, places, words.view(torch.int32), *cut, 256, 5, 0, 0, [1], 0, 5, True
        )
    for change, message in (
        ({"summands": 40_000}, "summands must leave a level to lanes of 16 bits, got 40000"),
        ({"contributors": 6}, "contributors must be from 1 to summands, 5, got 6"),
        ({"received": row.repeat(2, 1)}, "codes that were added must be one row, got 2"),
        ({"received": torch.zeros(words.numel() * 2 + 1, dtype=torch.int32)[None, 1:]},
         "words of codes that are added must begin at multiples of 8 bytes"),
    ):  # fmt: skip
        given = {
            "received": row, "norms": norms, "plan": plan, "out": out, "first": 0,
            "blocks": cut[0], "word_starts": cut[1], "rank": 0, "block_size": 256, "summands": 5,
            "contributors": 3, "scale": 1.0,
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.sum_blocks(**{**given, **change})


@pytest.mark.parametrize("exchange", ["two_phase", "allreduce"])
def test_a_budget_for_each_step(exchange: Any) -> None:
    """``DynamicBits`` gives steps of larger gradients a larger budget, and the mean budget is held;
    ``BlockBits`` spends each as it would alone."""
    dynamic = DynamicBits(6, total_steps=STEPS)
    group = Group(3, bits=BlockBits(dynamic), exchange=exchange)
    rng, budgets = RNG(11), []
    for step in range(STEPS):
        rows = spread(rng, (3, 4096)) * (8 if step % 2 else 1)
        means = group.exchange([[("x", row)] for row in rows])
        (bits,) = {rank.stats.bits for rank in group.ranks}
        budgets.append(bits)
        alone = Group(3, bits=BlockBits(bits), exchange=exchange, steps=[step] * 3)
        expected = alone.exchange([[("x", row)] for row in rows])
        assert torch.equal(means[0][0], expected[0][0])
    assert np.mean(budgets) == pytest.approx(6, abs=0.35)
    # The width of a step follows from the gradients before it.
    larger, smaller = np.mean(budgets[6::2]), np.mean(budgets[7::2])
    assert larger - smaller > 1
    assert len(set(budgets)) > 3


@pytest.mark.parametrize("budget", [4.5, DynamicBits(5)], ids=str)
def test_layouts_are_made_once(budget: Any) -> None:
    """For equal rules, as those of each step, and of each call of ``allreduce``."""
    rows, budgets = spread(RNG(12), (2, 4096)), set()
    layout.block_segments.cache_clear()
    for _ in range(3):
        group = Group(2, bits=BlockBits(budget))
        for _ in range(2):
            group.exchange([[("x", row)] for row in rows])
            budgets.add(group.ranks[0].stats.bits)
    assert layout.block_segments.cache_info().misses == len(budgets)


def test_a_schedule_is_saved() -> None:
    group = Group(2, bits=BlockBits(DynamicBits(5)))
    rows = spread(RNG(12), (2, 4096))
    for _ in range(3):
        group.exchange([[("x", row)] for row in rows])
    state = group.ranks[0].steps.state_dict()
    assert state["schedule"]["steps"] == 3
    with pytest.raises(ValueError, match="give bits as when the state was saved"):
        GlobalQSGD(bits=BlockBits(5)).load_state_dict(state)
    GlobalQSGD(bits=BlockBits(DynamicBits(5))).load_state_dict(state)
