"""The native kernels give the bits of the reference, on every instruction set and thread count."""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    WIDTHS,
    as_numpy,
    assert_same,
    bits_of,
    data,
    decode,
    encode,
    from_bits,
    gradient_like,
    instruction_set,
    name,
    norms,
    random_place,
    special_values,
)

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench import gpu
from hvd_gqsgd.bench import kernels as bench
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference.kinds import linear

BLOCKS = [1, 7, 256, 1000, 1024, 1500, None]
SIZES = [0, 1, 3, 255, 1023, 1024, 1025, 2049, 5000]
WORLDS = [(0, 1, True), (0, 1, False), (1, 2, True), (2, 3, False), (2, 3, True), (6, 7, True)]
BYTES = linear(8, 127)
EVERY_PATTERN = np.arange(2**16, dtype=np.uint16).view(np.int16)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_same_bits_as_reference(dtype: torch.dtype, bits: int) -> None:
    """Norms, words and decoded numbers: all sizes and blocks, on every instruction set."""
    rng = np.random.default_rng(bits)
    cases = itertools.cycle(itertools.product(range(4), WORLDS))
    for block_size, numel in itertools.product(BLOCKS, SIZES):
        kind, (rank, world_size, correlated) = next(cases)
        world_size = min(world_size, (2**bits - 1) // 2)
        rank = min(rank, world_size - 1)
        s = reference.levels(bits, world_size)
        code = linear(bits, s)
        x = data(rng, kind, numel, dtype)
        place = random_place(rng, rank, world_size, correlated)
        what = (block_size, numel, kind, place)

        own = reference.norms(as_numpy(x), block_size)
        # Another rank has the same numbers in other places, so that not all maxima are this one's.
        other = as_numpy(x.roll(1))
        shared = np.maximum(own, reference.norms(other, block_size))
        xi = reference.dither(numel, block_size, **place)
        codes = reference.codes(as_numpy(x), shared, block_size, s, xi, bits)
        words = reference.pack(codes, block_size, bits, s)
        # Any sum of codes, not only one that could have come from these gradients.
        most = world_size * s
        sums = rng.integers(-most, most, numel, endpoint=True)
        summed = reference.pack(sums, block_size, bits, most)
        scale = float(rng.choice([1 / world_size, 1.0, -0.5, 3e-3]))
        dense = reference.decode(sums, shared, block_size, s, scale, as_numpy(x).dtype)

        assert abs(codes).max(initial=0) <= s
        for isa in ops.instruction_sets():
            with instruction_set(isa):
                assert_same(norms(x, block_size), own, (isa, what))
                to_send = encode(x, torch.from_numpy(shared), block_size, code, **place)
                assert_same(to_send, words, (isa, what))
                received = decode(
                    torch.from_numpy(summed), torch.from_numpy(shared), x, block_size, code,
                    world_size, scale,
                )  # fmt: skip
                assert_same(received, dense, (isa, what))


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_large_results(dtype: torch.dtype, bits: int) -> None:
    """From 4 MiB on whole lines take another way to memory, wherever results begin."""
    rng = np.random.default_rng(bits)
    numel, block_size = 2**20 + 777, 1500
    x = torch.from_numpy(rng.standard_normal(numel)).to(dtype)
    x[:1500], x[-5] = 0, torch.inf
    code = linear(bits, reference.levels(bits, 1))
    shared = norms(x, block_size)
    words = encode(x, shared, block_size, code)
    codes = reference.unpack(words.numpy(), numel, block_size, bits, code.levels, 1)
    expected = reference.decode(
        codes, shared.numpy(), block_size, code.levels, 1.0, as_numpy(x).dtype
    )
    for isa, begin in itertools.product(ops.instruction_sets(), [0, 1, 2, 7, 16]):
        out = torch.full((numel + 32,), -77, dtype=dtype)
        with instruction_set(isa):
            ops.dequantize(words, shared, out[begin : begin + numel], block_size, *code, 1, 1.0)
        assert_same(out[begin : begin + numel], expected, (isa, begin))
        assert (torch.cat((out[:begin], out[begin + numel :])) == -77).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacking_undoes_packing(bits: int) -> None:
    """In the reference, which the kernels were just compared with."""
    rng = np.random.default_rng(bits)
    s = reference.levels(bits, 1)
    for block_size, numel in itertools.product(BLOCKS, SIZES):
        codes = rng.integers(-s, s, numel, endpoint=True)
        words = reference.pack(codes, block_size, bits, s)
        assert (reference.unpack(words, numel, block_size, bits, s, 1) == codes).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_special_values(dtype: torch.dtype) -> None:
    """NaN and infinity make their block NaN, and each other number comes back as it was."""
    x = special_values(dtype)
    code = linear(4, 7)
    maxima = norms(x, 1)
    assert_same(maxima, reference.norms(as_numpy(x), 1), "norms")
    back = decode(encode(x, maxima, 1, code), maxima, x, 1, code)
    finite = x.isfinite()
    assert back[~finite].isnan().all()
    # A zero has lost its sign; all else is a maximum, which no dither moves.
    assert torch.equal(bits_of(back[finite]), bits_of(x[finite] + 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_zero_blocks(dtype: torch.dtype) -> None:
    """Zeros decode to zeros, whatever the neighbouring blocks hold."""
    x = torch.cat([torch.zeros(10), -torch.zeros(10), torch.full((10,), 1e30)]).to(dtype)
    maxima = norms(x, 10)
    assert maxima[:2].tolist() == [0, 0]
    back = decode(encode(x, maxima, 10, BYTES), maxima, x, 10, BYTES)
    assert torch.equal(bits_of(back[:20]), bits_of(torch.zeros(20, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_widening_every_pattern(dtype: torch.dtype) -> None:
    """The norm of each of the 65536 numbers is its magnitude in float32."""
    x = from_bits(EVERY_PATTERN, dtype)
    for isa in ops.instruction_sets():
        with instruction_set(isa):
            got = norms(x, 1)
        number = ~x.isnan()
        assert torch.equal(got[number], bits_of(x[number].float().abs()))
        assert (got[~number] > 0x7F800000).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
@pytest.mark.parametrize("bits", [2, 8, 16])
def test_every_pattern_comes_back(dtype: torch.dtype, bits: int) -> None:
    """Alone in its block, each of the 65536 numbers is a maximum, and so exact."""
    x = from_bits(EVERY_PATTERN, dtype)
    code = linear(bits, reference.levels(bits, 1))
    maxima = norms(x, 1)
    for isa in ops.instruction_sets():
        with instruction_set(isa):
            back = decode(encode(x, maxima, 1, code), maxima, x, 1, code)
        finite = x.isfinite()
        assert torch.equal(bits_of(back[finite]), bits_of(x[finite] + 0))
        assert back[~finite].isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name)
def test_narrowing_rounds_as_torch_does(dtype: torch.dtype, sign: int) -> None:
    """All numbers of 16 bits, the ties between them, and the floats next to both."""
    patterns = torch.arange(0x7C00 if dtype == torch.float16 else 0x7F80)
    numbers = bits_of(from_bits(patterns, dtype).float())
    upper = bits_of(from_bits(patterns + 1, dtype).float())
    if dtype == torch.float16:  # the one after the largest would be 2^16
        upper[-1] = bits_of(torch.tensor(2.0**16))
    # Of numbers, not of their bits, which are not evenly spaced where the numbers are subnormal.
    midpoints = bits_of(torch.stack([numbers, upper]).view(torch.float32).double().mean(0).float())
    if dtype == torch.bfloat16:
        midpoints[-1] = 0x7F7F8000
    chosen = torch.cat([numbers, midpoints]).unsqueeze(1) + torch.tensor([-1, 0, 1])
    chosen = chosen.clamp(0, 0x7F7FFFFF).flatten().to(torch.int32)

    like = torch.empty(len(chosen), dtype=dtype)
    one = reference.pack(np.ones(len(chosen), np.int64), 1, 2, 1)
    for isa in ops.instruction_sets():
        with instruction_set(isa):
            got = decode(torch.from_numpy(one), chosen, like, 1, linear(2, 1), scale=sign)
        assert torch.equal(bits_of(got), bits_of((sign * chosen.view(torch.float32)).to(dtype)))


def test_values_beyond_their_norm_are_cut_off() -> None:
    """So a gradient that changes after its norm was taken cannot spill into another lane."""
    for dtype in DTYPES:
        x = torch.tensor([0.5, 2, -2, torch.inf, -torch.inf, torch.nan, 0, 1], dtype=dtype)
        maxima = norms(torch.ones_like(x), None)
        for bits in WIDTHS:
            s = reference.levels(bits, 1)
            words = encode(x, maxima, None, linear(bits, s))
            xi = reference.dither(
                8, None, seed=0, step=0, tensor_id=0, rank=0, world_size=1, correlated=True
            )
            codes = reference.codes(as_numpy(x), maxima.numpy(), None, s, xi, bits)
            assert codes[1:].tolist() == [s, -s, s, -s, -s, 0, s]
            assert_same(words, reference.pack(codes, None, bits, s), (dtype, bits))


def test_maxima_are_never_moved() -> None:
    """Where M * (s / M) falls short of s, by a rounding error, dither would: here, with the fewest
    binary places, one in a thousand."""
    for value in np.random.default_rng(0).uniform(1e-3, 1e3, 20):
        x = torch.full((4096,), value, dtype=torch.float32)
        x[::2] *= -1
        words = encode(x, norms(x, None), None, linear(16, 2**15 - 1))
        codes = reference.unpack(words.numpy(), 4096, None, 16, 2**15 - 1, 1)
        assert (codes == np.where(x > 0, 2**15 - 1, 1 - 2**15)).all()


def test_flushed_subnormals() -> None:
    """Where the processor takes subnormals for zero, their blocks are zero and no others suffer."""
    x = torch.cat([torch.full((5,), 1e-40), torch.full((5,), 1.0)])
    maxima = norms(x, 5)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        back = decode(encode(x, maxima, 5, BYTES), maxima, x, 5, BYTES)
    finally:
        torch.set_flush_denormal(False)
    assert back.tolist() == [0.0] * 5 + [1.0] * 5


@pytest.mark.parametrize("block_size", [1, 1000, 1024, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_threads_do_not_matter(
    thread_count: Callable[[int], None], dtype: torch.dtype, block_size: int | None
) -> None:
    """Enough elements for several threads, each of which takes 65536 at the least."""
    x = gradient_like(np.random.default_rng(0), 300_001, dtype)
    results = []
    for threads in (1, 2, 3, 5):
        thread_count(threads)
        maxima = norms(x, block_size)
        words = encode(x, maxima, block_size, linear(5, 3), rank=2, world_size=5)
        back = decode(words, maxima, x, block_size, linear(5, 3))
        results.append((maxima, words, bits_of(back)))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_threads_are_used(thread_count: Callable[[int], None]) -> None:
    """Two share the work: or the test above would say little. In seconds of processors, each taken
    by itself: a thread that waits for the other one, on a busy machine, may spin."""
    x = torch.ones(2**23)
    words = encode(x, maxima := norms(x, 1024), 1024, BYTES)
    for call in (
        lambda: ops.block_max(x, 1024, maxima),
        lambda: ops.quantize(x, maxima, words, 1024, *BYTES, 0, 0, 0, 0, 1, True),
        lambda: ops.dequantize(words, maxima, x, 1024, *BYTES, 1, 1.0),
    ):
        taken = []
        for threads in (1, 2):
            thread_count(threads)
            call()
            rounds = []
            for _ in range(3):  # other tests' threads of this process may be at work in one of them
                time.sleep(0.05)  # PyTorch's threads may look out for more work for a while
                everyone, begun = time.process_time(), time.thread_time()
                _ = [call() for _ in range(10)]
                own = time.thread_time() - begun
                rounds.append((time.process_time() - everyone - own, own))
            taken.append(min(rounds))
        (others, alone), shared = taken
        assert others < 0.1 * alone
        assert min(shared) > 0.15 * sum(shared)  # which may be less than alone, of cached memory


@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes_never_overflow(bits: int) -> None:
    """All codes s, or all -s, or both by turns, from as many ranks as lanes of this width take."""
    most = (2**bits - 1) // 2
    worlds = range(1, most + 1) if bits <= 8 else [1, 2, 3, 5, 8, 100, most // 2, most - 1, most]
    dtype = layout.word_dtype(bits)
    lanes = torch.iinfo(dtype).bits // bits
    numel = 3 * lanes + 1  # full words, and one that is not
    signs = torch.ones(numel)
    signs[1::2] = -1
    for x in (torch.ones(numel), -torch.ones(numel), signs):
        maxima = norms(x, None)
        for world_size in worlds:
            s = reference.levels(bits, world_size)
            code = linear(bits, s)
            words = [
                encode(x, maxima, None, code, rank=rank, world_size=world_size)
                for rank in (0, world_size - 1)
            ]
            assert torch.equal(*words)  # no dither moves a maximum
            exact = [world_size * word for word in words[0].tolist()]
            assert min(exact) >= torch.iinfo(dtype).min
            assert max(exact) <= torch.iinfo(dtype).max
            total = torch.tensor(exact, dtype=dtype)
            sums = reference.unpack(total.numpy(), numel, None, bits, s, world_size)
            assert (sums == world_size * s * x.numpy()).all()
            # As a multiple of levels, which small integers are exactly.
            back = decode(total, maxima, x, None, code, world_size, float(s))
            assert torch.equal(back, world_size * s * x)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("bits", [8, 5])
def test_opcheck(dtype: torch.dtype, bits: int) -> None:
    """Schemas tell what is written, and the ops pass through ``torch.compile``."""
    x = gradient_like(np.random.default_rng(0), 1500, dtype)
    maxima = norms(x, 1024)
    code = linear(bits, 3)
    words = encode(x, maxima, 1024, code)
    torch.library.opcheck(ops.block_max, (x, 1024, torch.zeros_like(maxima)))
    place = (7, 8, 9, 1, 3, True)
    torch.library.opcheck(ops.quantize, (x, maxima, torch.zeros_like(words), 1024, *code, *place))
    torch.library.opcheck(ops.dequantize, (words, maxima, torch.zeros_like(x), 1024, *code, 1, 0.5))


def runs_beside(work: Callable[[], object]) -> bool:
    """Whether another Python thread gets to run while this one works.

    Python is told to leave the interpreter lock with a thread that does not give it up by itself.
    """
    gate, ran = threading.Lock(), []
    gate.acquire()

    def other() -> None:
        with gate:
            ran.append(True)

    thread = threading.Thread(target=other)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread.start()
        gate.release()
        for _ in range(20):  # the other thread may take its time to wake up
            work()
            if ran:
                break
        result = bool(ran)
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    return result


def test_the_gil_is_released() -> None:
    """While a big op runs, other threads get on with their work."""
    x = torch.ones(2**24)
    maxima = torch.zeros(2**14, dtype=torch.int32)
    words = torch.zeros(2**22, dtype=torch.int32)
    assert runs_beside(lambda: ops.block_max(x, 1024, maxima))
    assert runs_beside(lambda: ops.quantize(x, maxima, words, 1024, *BYTES, 0, 0, 0, 0, 1, True))
    assert runs_beside(lambda: ops.dequantize(words, maxima, x, 1024, *BYTES, 1, 1.0))
    assert not runs_beside(lambda: sum(range(10**6)))  # nor would it, were the GIL kept


def test_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    """It prints one JSON object, or a table, and leaves the settings as they were."""
    before = ops.instruction_set(), torch.get_num_threads()
    arguments = ["--numel", "5000", "--repeats", "2", "--bits", "5", "--dtype", "bfloat16"]
    bench.main([*arguments, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["kernels"]) == set(ops.instruction_sets())
    assert result["ratio_to_memcpy"] == result["kernels"][before[0]]["ratio_to_memcpy"] > 0
    assert (result["bits"], result["levels"], result["numel"]) == (5, 15, 5000)
    # Read 2; read 2, write 8 for each 12 elements of a tile; and the other way round.
    words = 4 * -(-1024 // 12) + -(-(5000 - 4096) // 12)
    assert result["bytes_per_element"] == pytest.approx(6 + 2 * 8 * words / 5000)

    bench.main(arguments)
    shown = capsys.readouterr().out
    assert "15 levels" in shown
    assert all(isa in shown for isa in ops.instruction_sets())
    assert before == (ops.instruction_set(), torch.get_num_threads())

    with pytest.raises(SystemExit):
        bench.main(["--bits", "17"])
    assert "--bits must be from 2 to 16, got 17" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_passes_of_the_bench_for_gpus(bits: int) -> None:
    """They run, here on the CPU, and the bytes that they count are about those of the copy."""
    passes, moved = gpu.passes_on(torch.randn(20_000), bits, 1024)
    for call in passes.values():
        call()
    assert passes.keys() >= moved.keys()
    assert all(0 < moved[name] <= 2 * moved["copy"] for name in moved)
