"""The exchange in one phase, a reduce-scatter: the reference's bits, and its error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    TWO_PHASE_CODES,
    as_numpy,
    assert_same,
    bits_of,
    instruction_set,
    name,
    send,
    several,
    shared_norms,
)
from torch import Tensor

from hvd_gqsgd import BlockBits, layout, simulate
from hvd_gqsgd._native import ops
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.reference import block_bits as reference_block_bits
from hvd_gqsgd.reference import two_phase as reference
from hvd_gqsgd.reference.kinds import Code, linear
from hvd_gqsgd.transports.simulated import SimulatedWorld

RNG = np.random.default_rng
SHAPES = list(itertools.product([7, 256, 1024, 1500, None], [0, 1, 1023, 2600]))


def identity(numel: int, dtype: torch.dtype, rank: int) -> int:
    """Of the shard of a rank, in the first unnamed tensor of a step."""
    return digest(("shard", digest((0, 0, numel, str(dtype))), rank))


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_reference(dtype: torch.dtype, code: Code) -> None:
    """All sizes and blocks, on every instruction set."""
    rng = RNG(code.bits)
    cases = itertools.cycle(itertools.product([1, 2, 3, 5], range(5), ["max", "l2"], [True, False]))
    for block_size, numel in SHAPES:
        for _ in range(7):
            n, kind, norm, correlated = next(cases)
        rows = several(rng, kind, (n, numel), dtype)
        at = {"seed": 3, "step": numel, "tensor_id": int(rng.integers(0, 2**31))}
        expected = reference.one_phase_mean(
            as_numpy(rows), dither=code.dither, bits=code.bits, block_size=block_size, norm=norm,
            correlated=correlated, **at,
        )  # fmt: skip
        shared = shared_norms(rows, block_size, norm)
        words = send(rows, shared, block_size, code, correlated=correlated, **at)
        block = block_size or max(numel, 1)
        for isa in ops.instruction_sets():
            out = torch.full_like(rows[0], -77)
            with instruction_set(isa):
                ops.sum_codes(words, shared, out, block, *code, 1 / n)
            assert_same(out, expected, (isa, block_size, numel, n, kind, norm))


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("options", [
    {}, {"bits": 5, "norm": "l2"}, {"dither": "exponential", "correlated": False},
    {"dither": "exponential", "bits": 4, "block_size": None}, {"bits": BlockBits(3)},
], ids=str)  # fmt: skip
def test_simulate_has_the_bits_of_the_reference(n: int, options: dict[str, object]) -> None:
    """Shard by shard; the last ones are padded with zeros."""
    numel = 2999
    rows = several(RNG(n), 0, (n, numel), torch.float32)
    mean = simulate(rows, step=4, seed=5, exchange="one_phase", **options)  # type: ignore[call-overload]
    padded = torch.nn.functional.pad(rows, (0, -numel % n))
    resolved = Options(exchange="one_phase", **options)  # type: ignore[arg-type]
    length = padded.shape[1] // n
    for rank in range(n):
        shard = slice(rank * length, min((rank + 1) * length, numel))
        at = {"seed": 5, "step": 4, "tensor_id": identity(padded.shape[1], rows.dtype, rank)}
        mine = as_numpy(padded[:, rank * length : (rank + 1) * length])
        common = {"correlated": resolved.correlated, "norm": resolved.norm}
        if isinstance(bits := resolved.bits, BlockBits):
            rule = reference_block_bits.Rule(bits.budget, bits.power, bits.min_bits, bits.max_bits)
            expected = reference_block_bits.one_phase_mean(
                mine, rule, block_size=bits.block_size, **common, **at
            )
        else:
            assert isinstance(bits, int)
            expected = reference.one_phase_mean(
                mine, dither=resolved.dither, bits=bits, block_size=resolved.block_size, **common,
                **at,
            )  # fmt: skip
        assert_same(mean[shard], expected[: shard.stop - shard.start], rank)


def test_several_tensors_in_a_bucket() -> None:
    """Each rank gets its shard of each; the dither is that of the tensor, in a bucket or alone."""
    n, numels = 3, [3000, 6, 4500]
    everyone = [several(RNG(i), 0, (n, numel), torch.float32) for i, numel in enumerate(numels)]
    results: list[list[Tensor]] = []
    for bucket_mb in (25.0, 1e-6):
        world, options = SimulatedWorld(n), Options(exchange="one_phase", bucket_mb=bucket_mb)
        ranks = [Pipeline(options, world.transport(rank)) for rank in range(n)]
        outs = [torch.empty(n, numel // n) for numel in numels]
        tickets = [
            [pipeline.submit(rows[rank], out=out[rank])
             for rows, out in zip(everyone, outs, strict=True)]
            for rank, pipeline in enumerate(ranks)
        ]  # fmt: skip
        for pipeline in ranks:
            pipeline.flush()
        for _ in range(2 * len(numels) + 1):
            done = [
                pipeline.poll(ticket)
                for pipeline, mine in zip(ranks, tickets, strict=True) for ticket in mine
            ]  # fmt: skip
        assert all(contribution is not None for contribution in done)
        for pipeline, mine in zip(ranks, tickets, strict=True):
            for ticket in mine[::-1]:
                pipeline.decode(ticket, 1 / n)
        results.append([out.view(-1) for out in outs])
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0], simulate(everyone[0], exchange="one_phase"))


def test_a_tensor_that_has_no_shards() -> None:
    world = SimulatedWorld(3)
    with pytest.raises(ValueError, match="shards of one length for 3 ranks, got 10 elements: pad"):
        Pipeline(Options(exchange="one_phase"), world.transport(0)).submit(torch.ones(10))


def test_the_error_is_that_of_the_first_phase() -> None:
    """Where ranks are equal, a rounding to n s levels; two phases have one to s levels."""
    n, s = 4, 127
    rows = torch.rand(4096, generator=torch.Generator().manual_seed(0)).expand(n, -1).contiguous()
    errors = [simulate(rows, exchange="one_phase", step=k) - rows[0] for k in range(8)]
    square = torch.stack(errors).double().square().mean().item()
    assert square == pytest.approx(1 / (6 * n**2 * s**2), rel=0.1)


def test_blocks_that_are_not_finite() -> None:
    """NaN on one rank makes its block NaN in the owner's shard, and nothing else."""
    rows = several(RNG(0), 0, (2, 4096), torch.float32)
    clean = simulate(rows, exchange="one_phase", block_size=256)
    rows[1, 3000] = torch.nan
    mean = simulate(rows, exchange="one_phase", block_size=256)
    block = slice(2816, 3072)
    assert mean[block].isnan().all()
    mean[block], clean[block] = 0, 0
    assert torch.equal(bits_of(mean), bits_of(clean))


@pytest.mark.parametrize("code", TWO_PHASE_CODES, ids=str)
def test_any_words_decode(code: Code) -> None:
    """Whatever other ranks have sent: no sum is larger than all of them could mean."""
    rng = RNG(1)
    dtype = layout.word_dtype(code.bits)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    count = layout.words_for(3000, 1024, code.bits)
    words = torch.from_numpy(rng.integers(low, high, (3, count), dtype=str(dtype)[6:]))
    norms = torch.ones(3).view(torch.int32)
    out = torch.empty(3000)
    ops.sum_codes(words, norms, out, 1024, *code, 1.0)
    assert (out.abs() <= 3 * (1 + 2 / code.levels)).all()


WORDS, NORMS, CODE = (
    torch.zeros(2, 30, dtype=torch.int32),
    torch.ones(10).view(torch.int32),
    linear(8, 127),
)


def sum_call(
    words: Tensor = WORDS, norms: Tensor = NORMS, numel: int = 100, code: Code = CODE
) -> None:
    ops.sum_codes(words, norms, torch.empty(numel), 10, *code, 1.0)


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda: sum_call(WORDS.long()), TypeError, "received must be Int, got Long"),
    (lambda: sum_call(WORDS[0]), ValueError, "received must be a row of 30 words for each rank"),
    (lambda: sum_call(WORDS[:0]), ValueError, "received must be a row of 30 words for each rank"),
    (lambda: sum_call(WORDS[:, 1:]), ValueError, "received must be a row of 30 words for each"),
    (lambda: sum_call(WORDS[:1].expand(32769, -1)), ValueError, "at most 32768 ranks, got 32769"),
    (lambda: sum_call(norms=NORMS[1:]), ValueError, "norms must have 10 elements, got 9"),
    (lambda: sum_call(numel=101), ValueError, "norms must have 11 elements, got 10"),
    (lambda: sum_call(code=linear(8, 128)), ValueError, "levels must be from 1 to 127"),
])  # fmt: skip
def test_what_is_refused(call, kind, message) -> None:  # type: ignore[no-untyped-def]
    sum_call()
    with pytest.raises(kind, match=message):
        call()


def test_operators_are_well_formed() -> None:
    out = torch.empty(100)
    torch.library.opcheck(ops.sum_codes, (WORDS, NORMS, out, 10, *CODE, 0.5))
