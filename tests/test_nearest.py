"""Rounding to nearest, and two phases whose owners keep what their rounding has left out."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DTYPES, as_numpy, assert_same, data, encode, instruction_set, name, same_bits
from test_feedback import relative, residuals, step
from test_selections import ranks
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench.wire import wire_bytes_of
from hvd_gqsgd.exchanges import selected
from hvd_gqsgd.options import Options
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference.kinds import linear, nearest
from hvd_gqsgd.simulation import SimulatedRanks

NEAREST: dict[str, Any] = {"rounding": "nearest"}
EF21: dict[str, Any] = NEAREST | {"error_feedback": "ef21"}
TWO_PHASE: list[dict[str, Any]] = [
    EF21 | {"bits": 2},
    EF21 | {"bits": 3, "keep": 1 / 4, "block_size": None},
    EF21 | {"bits": 2, "keep": 1 / 4, "select": "leader", "block_size": 1500},
    EF21 | {"bits": DynamicBits(4, total_steps=60, min_bits=2), "block_size": 3000},
    {"error_feedback": "ef21", "bits": 3, "block_size": 7},
    NEAREST | {"error_feedback": "econtrol", "bits": 3, "block_size": 256},
]
ECONTROL: list[dict[str, Any]] = [
    TWO_PHASE[-1],
    NEAREST | {"error_feedback": "econtrol", "bits": 2},
    {"error_feedback": "econtrol", "bits": 4, "exchange": "two_phase"},
    {"error_feedback": "econtrol", "bits": 4, "keep": 1 / 4, "exchange": "two_phase"},
    {"error_feedback": "econtrol", "bits": 6, "exchange": "allreduce"},
]
RESIDUAL: list[dict[str, Any]] = [
    NEAREST | {"error_feedback": "residual", "bits": 2},
    NEAREST | {"error_feedback": "residual", "bits": 4, "exchange": "allreduce"},
    NEAREST | {"error_feedback": "residual", "bits": 3, "keep": 1 / 4},
    NEAREST | {"select": "leader", "bits": 2, "keep": 1 / 4},
    NEAREST | {"error_feedback": "residual", "bits": BlockBits(5, min_bits=4)},
    NEAREST | {"error_feedback": "residual", "select": "permutation", "bits": 3, "keep": 1 / 4},
]
NUMELS = [5003, 33, 9000, 1]


def decoded(x: Tensor, norms: Tensor, block: int | None, code: Any, **place: Any) -> Tensor:
    out = torch.empty_like(x)
    words = encode(x, norms, block, code, **place)
    ops.dequantize(words, norms, out, block or max(x.numel(), 1), *code, 1, 1.0)
    return out


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_reference(dtype: torch.dtype, bits: int) -> None:
    """On every instruction set; for any seed, step and rank."""
    rng = np.random.default_rng(bits)
    for kind, (block, numel) in enumerate(
        itertools.product([7, 1024, 1500, None], [0, 33, 1025, 5000])
    ):
        x = data(rng, kind % 4, numel, dtype)
        norms = reference.norms(as_numpy(x), block)
        code = nearest(bits, reference.levels(bits, 1))
        half = np.full(numel, 2**31, np.uint32)
        codes = reference.codes(as_numpy(x), norms, block, code.levels, half, bits)
        words = reference.pack(codes, block, bits, code.levels)
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                got = encode(
                    x, torch.from_numpy(norms), block, code,
                    seed=kind, step=3, tensor_id=5, rank=1, world_size=2,
                )  # fmt: skip
                assert_same(got, words, (isa, block, numel, kind))


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_no_error_is_larger_than_its_element(levels: int) -> None:
    """|C(x) - x| <= min(|x|, M / 2s), and the largest element is exact; not so with dither."""
    x = torch.cat([torch.randn(50_000), torch.linspace(-1, 1, 4001), torch.zeros(7)])
    norms = torch.empty(-(-x.numel() // 1024), dtype=torch.int32)
    ops.block_max(x, 1024, norms)
    shared = norms.view(torch.float32).repeat_interleave(1024)[: x.numel()]
    errors = (decoded(x, norms, 1024, nearest(8, levels)) - x).abs()
    most = torch.minimum(x.abs(), shared / (2 * levels))
    assert (errors <= most + 1e-6 * shared).all()
    assert (errors[x.abs() == shared] <= 1e-6 * shared[x.abs() == shared]).all()
    dithered = (decoded(x, norms, 1024, linear(8, levels)) - x).abs()
    assert (dithered > most + 1e-6 * shared).double().mean() > 0.2


@pytest.mark.parametrize(("levels", "rows"), [(1, 1), (1, 3), (3, 2)])
def test_the_contraction_of_the_theory(levels: int, rows: int) -> None:
    """THEORY: a factor of 1 - 1/(1 + (nB - 1)/(4s^2)) at most, over all ranks, which elements just
    below M / 2s reach; not so with dither, which goes beyond 1."""
    block, code = 1024, nearest(8, levels)
    bound = 1 - 1 / (1 + (rows * block - 1) / (4 * levels**2))
    worst = torch.full((rows, block), 0.999999 / (2 * levels))
    worst[0, 0] = 1
    found = {}
    normal = torch.randn(rows, block, generator=torch.Generator().manual_seed(0))
    for name_, x in (("worst", worst), ("normal", normal)):
        norms = x.abs().max().reshape(1).view(torch.int32)
        for kind in (code, linear(8, levels)):
            c = torch.stack([decoded(row, norms, block, kind) for row in x])
            found[name_, kind.kind] = float((c - x).square().sum() / x.square().sum())
    assert found["worst", code.kind] == pytest.approx(bound, abs=1e-4)
    assert found["normal", code.kind] < bound
    if levels == 1:
        assert found["normal", linear(8, 1).kind] > 1


def test_nearest_at_widths_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one level in all blocks of an Allreduce estimates come to the mean; with dither not, in
    as many steps."""
    generator = torch.Generator().manual_seed(0)
    rows, bits = torch.randn(3, 4096, generator=generator), BlockBits(3, min_bits=3)
    world = ranks(3, error_feedback="ef21", rounding="nearest", bits=bits)
    assert min(relative(step(world, rows), rows.mean(0)) for _ in range(60)) < 1e-5
    with pytest.raises(ValueError, match="needs 2 levels a side"):
        step(ranks(3, error_feedback="ef21", bits=bits), rows)
    monkeypatch.setattr(selected, "LEAST_LEVELS", 1)
    world = ranks(3, error_feedback="ef21", bits=bits)
    assert min(relative(step(world, rows), rows.mean(0)) for _ in range(60)) > 0.1


@pytest.mark.parametrize("size", [4, 8])
def test_one_level_brings_estimates_nearer_to_nearest_alone(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 bits in two phases; with dither, they go astray."""
    generator = torch.Generator().manual_seed(0)
    rows, options = (
        torch.randn(size, 2048, generator=generator),
        {"error_feedback": "ef21", "bits": 2},
    )
    world = ranks(size, **options, rounding="nearest")
    assert min(relative(step(world, rows), rows.mean(0)) for _ in range(40)) < 1e-5
    with pytest.raises(ValueError, match=r"lanes of 2 bits have 1 .* or pass rounding='nearest'"):
        step(ranks(size, **options), rows)
    monkeypatch.setattr(selected, "LEAST_LEVELS", 1)
    world = ranks(size, **options)
    assert min(relative(step(world, rows), rows.mean(0)) for _ in range(40)) > 0.8


def buckets_of(step_: int) -> str:
    """Names of the gradients of a step: others in each, so that owners change."""
    return ("abcd", "dc", "a", "cab", "bd")[step_ % 5]


def means_of(world: SimulatedRanks, step_: int, size: int, dtype: torch.dtype) -> dict[str, Any]:
    """The rows and the mean of each gradient of a step."""
    generator = torch.Generator().manual_seed(step_)
    rows = {
        each: torch.randn(size, NUMELS["abcd".index(each)], generator=generator).to(dtype)
        for each in buckets_of(step_)
    }
    means = world.means(
        [[(key, x[rank].clone()) for key, x in rows.items()] for rank in range(size)]
    )
    return {key: (x, mean.clone()) for (key, x), mean in zip(rows.items(), means, strict=True)}


def summed(world: SimulatedRanks, kind: str) -> Tensor:
    """Over the ranks, one gradient behind the other."""
    states = [state["memory"]["tensors"][kind] for state in world.state_dicts()]
    keys = sorted({each for state in states for each in state})
    return torch.cat([
        sum(state[each].double() for state in states if each in state) for each in keys
    ])  # fmt: skip


@pytest.mark.parametrize("options", TWO_PHASE, ids=str)
@pytest.mark.parametrize("size", [2, 5])
def test_what_ranks_owe_is_what_estimates_lack(options: dict[str, Any], size: int) -> None:
    """The mean of the ranks' own estimates is the estimate that all have and what is owed, whoever
    owns an element; without what is owed they differ."""
    dtype = torch.float64 if options["bits"] == 3 else torch.float32
    world = ranks(size, **options)
    for i in range(12):
        means_of(world, i, size, dtype)
    lacking = summed(world, "own") / size - summed(world, "mean") / size
    assert relative(summed(world, "owed"), lacking) < 1e-5
    assert lacking.norm() > 0.1 * (summed(world, "mean") / size).norm()
    first, second = (state["memory"]["tensors"]["mean"] for state in world.state_dicts()[:2])
    assert all(same_bits(first[key], second[key]) for key in first)


@pytest.mark.parametrize("options", ECONTROL, ids=str)
def test_econtrol_has_what_owners_owe(options: dict[str, Any]) -> None:
    """The results of all steps and the mean residual add up to the gradients, whoever owns an
    element; the ranks' own estimates alone lack what was owed in each step."""
    size, world = 4, ranks(4, **options)
    sent, exact = dict.fromkeys(NUMELS, 0.0), dict.fromkeys(NUMELS, 0.0)
    for i in range(15):
        for rows, mean in means_of(world, i, size, torch.float32).values():
            sent[mean.numel()] += mean.double()
            exact[mean.numel()] += rows.double().mean(0)
    kept = dict.fromkeys(NUMELS, 0.0)
    for state in world.state_dicts():
        for x in state["memory"]["tensors"]["residual"].values():
            kept[x.numel()] += x.double() / size
    for numel in NUMELS:
        assert relative(sent[numel] + kept[numel], exact[numel]) < 1e-5
    assert relative(sent[9000], exact[9000]) > 0.01


def test_econtrol_at_2_bits_comes_to_a_gradient() -> None:
    """A quarter of the share of the residual does; a whole one goes astray."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2048, generator=generator)
    world = ranks(4, **ECONTROL[1])
    assert min(relative(step(world, rows), rows.mean(0)) for _ in range(120)) < 0.01


@pytest.mark.parametrize("options", RESIDUAL, ids=str)
def test_residuals_have_the_rounding(options: dict[str, Any]) -> None:
    """What was sent, the mean residual and what is owed add up to the gradients."""
    size, world = 4, ranks(4, **options)
    sent: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for i in range(10):
        for key, (rows, mean) in means_of(world, i, size, torch.float32).items():
            sent[key] = sent.get(key, 0) + mean.double()
            exact[key] = exact.get(key, 0) + rows.double().mean(0)
    left = sum(exact[key].sum() - sent[key].sum() for key in exact)
    kept = summed(world, "residual").sum() / size
    owed = [state["memory"]["tensors"]["owed"] for state in world.state_dicts()]
    kept += sum(float(x.sum(dtype=torch.float64)) for own in owed for x in own.values())
    scale = float(sum(each.abs().sum() for each in exact.values()))
    assert abs(float(left - kept)) < 1e-6 * scale
    lost = sum(relative(sent[key], exact[key]) for key in exact)
    assert lost > 0.05


@pytest.mark.parametrize("block", [2048, 3000, None])
def test_buckets_of_any_size(block: int | None) -> None:
    """The second norms are those of tiles, wherever the segment of a rank begins."""
    options: dict[str, Any] = {"error_feedback": "ef21", "bits": 4, "exchange": "two_phase"}
    worlds = [ranks(3, **options, block_size=block, bucket_mb=mb) for mb in (25, 0.01)]
    for i in range(3):
        rows = torch.randn(3, 2, 10_007, generator=torch.Generator().manual_seed(i))
        whole, cut = (
            world.means([[("a", a.clone()), ("b", b.clone())] for a, b in rows]) for world in worlds
        )
        assert all(map(same_bits, whole, cut))


@pytest.mark.parametrize("options", [TWO_PHASE[0], TWO_PHASE[2], RESIDUAL[0]], ids=str)
def test_a_skipped_step_and_a_checkpoint(options: dict[str, Any]) -> None:
    """A step with infinity leaves what is owed, and states have it."""
    world, twin = ranks(3, **options), ranks(3, **options)
    rows = torch.randn(5, 3, 5003)
    for each in rows[:2]:
        step(world, each)
        step(twin, each)
    broken = rows[2].clone()
    broken[1, 17] = torch.inf
    assert step(world, broken).isnan().any()
    step(twin, torch.full_like(broken, torch.nan))
    resumed = ranks(3, **options)
    resumed.load_state_dicts(copy.deepcopy(world.state_dicts()))
    for each in rows[3:]:
        mean = step(world, each)
        assert mean.isfinite().all()
        assert same_bits(mean, step(twin, each))
        assert same_bits(mean, step(resumed, each))


def test_a_state_for_an_exchange_that_owes_nothing() -> None:
    """It has no owners: estimates begin with zeros on all ranks, as the owed part would be lost."""
    options: dict[str, Any] = {"error_feedback": "ef21", "bits": 4, **NEAREST}
    world, summing = ranks(3, **options, exchange="two_phase"), ranks(3, **options)
    rows = torch.randn(3, 3, 8192)
    for each in rows[:2]:
        step(world, each)
    summing.load_state_dicts(world.state_dicts())
    mean, fresh = step(summing, rows[2]), ranks(3, **options)
    assert same_bits(mean, step(fresh, rows[2]))
    assert not any(state["memory"]["tensors"]["owed"] for state in summing.state_dicts())


def test_residuals_of_a_state_for_an_exchange_that_owes_nothing() -> None:
    """They take over what is owed: nothing is lost between the exchanges."""
    options: dict[str, Any] = {"error_feedback": "residual", "bits": 4, **NEAREST}
    world = ranks(3, **options, exchange="two_phase")
    rows = torch.randn(4, 3, 8192)
    sent = sum(step(world, each).double() for each in rows[:2])
    assert summed(world, "owed").norm() > 0.1 * residuals(world).mean(0).norm()
    summing = ranks(3, **options, exchange="allreduce")
    summing.load_state_dicts(world.state_dicts())
    sent += sum(step(summing, each).double() for each in rows[2:])
    exact = rows.double().mean(1).sum(0)
    assert relative(sent + residuals(summing).mean(0), exact) < 1e-6
    assert relative(sent, exact) > 0.05
    assert not any(state["memory"]["tensors"]["owed"] for state in summing.state_dicts())


def test_a_state_whose_tensors_do_not_fit_together() -> None:
    """All ranks raise the error, and none waits."""
    options: dict[str, Any] = {"error_feedback": "residual", "bits": 4, **NEAREST}
    world = ranks(3, **options, exchange="two_phase")
    step(world, torch.randn(3, 8192))
    states = world.state_dicts()
    for x in states[1]["memory"]["tensors"]["owed"].values():
        x.resize_(17)
    summing = ranks(3, **options, exchange="allreduce")
    summing.load_state_dicts(states)
    with pytest.raises(ValueError, match="8192 elements for a gradient of 17: load a state of the"):
        step(summing, torch.randn(3, 8192))


@pytest.mark.parametrize("options", [*TWO_PHASE, *RESIDUAL], ids=str)
def test_bytes_on_the_wire(options: dict[str, Any]) -> None:
    """As of THEORY: in two phases, the means of a rank begin at a multiple of 8 bytes."""
    if isinstance(options["bits"], DynamicBits):
        options = options | {"bits": 2}
    world, numels = ranks(4, **options), [20_000, 10_007, 33]
    world.means([[(str(n), torch.randn(n)) for n in numels] for _ in range(4)])
    assert world.stats.compressed_bytes_on_wire == wire_bytes_of(Options(**options), numels, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (NEAREST, "is biased, and needs error feedback: pass error_feedback='residual'"),
        (NEAREST | {"keep": 1 / 8}, "is biased, and needs error feedback"),
        ({"rounding": "up"}, "rounding must be one of"),
        (EF21 | {"dither": "exponential"}, "takes linear codes, got dither='exponential'"),
        (EF21 | {"norm": "l2"}, "takes norm='max', got norm='l2'"),
        (EF21 | {"correlated": False}, "has no effect with rounding='nearest'"),
        (EF21 | {"bits": "auto"}, "does not go with bits='auto'"),
        (NEAREST | {"bits": "auto"}, "does not go with bits='auto'.* or leave rounding out"),
        (EF21 | {"hierarchy": "node"}, "hierarchy='node' does not go with"),
        (EF21 | {"exchange": "one_phase"}, "leave exchange out"),
        (
            NEAREST | {"error_feedback": "residual", "bits": BlockBits(4), "exchange": "two_phase"},
            "does not go with rounding='nearest' and bits=BlockBits",
        ),
        ({"error_feedback": "residual"}, "no effect with keep=1, .* rounding='nearest', or leave"),
    ],
    ids=str,
)
def test_options_that_are_not_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)
