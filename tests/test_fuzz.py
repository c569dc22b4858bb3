"""Whatever Hypothesis draws: the bits of the reference, and no more than an error from lying peers.

Here the examples are few and the same in each run. ``make fuzz`` draws many more, others each time:
``pytest tests/test_fuzz.py --hypothesis-profile long``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import as_numpy
from hypothesis import event, example, given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS, layouts, magnitudes, operators, ranks
from torch import Tensor

from hvd_gqsgd import AgreementError, BlockBits, DynamicBits, layout, simulate
from hvd_gqsgd._native import ops
from hvd_gqsgd.codecs.bit_schedule import WORD_MAX, Schedule
from hvd_gqsgd.engine.agreement import Ahead, WithNorms
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.exchanges.contribution import Contribution, everyone
from hvd_gqsgd.frontends.horovod_probe import Reading, disagreement
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.reference import two_phase as reference_two_phase
from hvd_gqsgd.transports.base import Handle
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

STEPS = st.integers(0, 2**31 - 2)
LENGTHS = st.one_of(st.integers(0, 90), st.sampled_from([1023, 1024, 1025, 2049, 3100]))


def expected(rows: Tensor, label: int, step: int, options: dict[str, Any]) -> Any:
    """What the reference makes of one tensor of each rank; of one rank, the tensor itself."""
    if len(rows) == 1:
        return as_numpy(rows[0])
    kind = Options(**options).exchange_for(len(rows))
    known = {key: options[key] for key in ("bits", "block_size", "correlated", "seed", "norm")}
    known["tensor_id"] = digest((label, 0, rows.shape[1], str(rows.dtype)))
    if kind == "allreduce":
        return reference.mean(as_numpy(rows), step=step, **known)
    return reference_two_phase.two_phase_mean(
        as_numpy(rows), step=step, dither=options["dither"], **known
    )


def assert_same_bits(got: Tensor, right: Any) -> None:
    bits = as_numpy(got)
    assert bits.dtype == right.dtype
    assert np.array_equal(bits.view(f"i{bits.itemsize}"), right.view(f"i{bits.itemsize}"))


@pytest.mark.slow
@given(st.data())
def test_simulate_has_the_bits_of_the_reference(data: st.DataObject) -> None:
    """Any number of ranks, any numbers, any layout, any operator."""
    n = data.draw(ranks, "ranks")
    numel = data.draw(LENGTHS if n < 10 else st.integers(0, 60), "elements")
    rows = layouts(data.draw(magnitudes((n, numel))), data.draw(LAYOUTS))
    options, step = data.draw(operators(n)), data.draw(STEPS)
    event(Options(**options).exchange_for(n))
    with np.errstate(all="ignore"):
        right = expected(rows.contiguous(), 0, step, options)
    assert_same_bits(simulate(rows, step=step, **options), right)


class Ranks:
    """A pipeline for each rank of a simulated world."""

    def __init__(self, n: int, step: int, make: Callable[..., Any], **options: Any) -> None:
        world = SimulatedWorld(n)
        resolved = Options(**options)
        self.pipelines = [
            Pipeline(resolved, make(world, rank), steps=Steps(resolved.bits, step))
            for rank in range(n)
        ]

    def exchange(self, tensors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """The means that each rank decodes of its tensors."""
        tickets = [
            [p.submit(x) for x in own] for p, own in zip(self.pipelines, tensors, strict=True)
        ]
        for pipeline in self.pipelines:
            pipeline.flush()
        for _ in range(4 * len(tensors[0])):
            for pipeline in self.pipelines:
                pipeline.advance()
        for pipeline, own in zip(self.pipelines, tickets, strict=True):
            for ticket in own:
                pipeline.wait(ticket)
        return [
            [pipeline.decode(ticket, 1 / len(self.pipelines)) for ticket in own]
            for pipeline, own in zip(self.pipelines, tickets, strict=True)
        ]


@given(st.data())
def test_tensors_in_buckets_have_the_bits_of_the_reference(data: st.DataObject) -> None:
    """Several tensors of a step, of other types and lengths, whatever buckets they share."""
    n = data.draw(st.integers(1, 5), "ranks")
    lengths = data.draw(st.lists(LENGTHS, min_size=1, max_size=5), "elements")
    rows = [data.draw(magnitudes((n, numel))) for numel in lengths]
    options, step = data.draw(operators(n)), data.draw(STEPS)
    bucket_mb = data.draw(st.sampled_from([1e-6, 1e-3, 5e-3, 25]), "bucket_mb")
    group = Ranks(n, step, SimulatedTransport, bucket_mb=bucket_mb, **options)
    with np.errstate(all="ignore"):
        right = [expected(x, label, step, options) for label, x in enumerate(rows)]
    for means in group.exchange([[x[rank] for x in rows] for rank in range(n)]):
        for mean, expect in zip(means, right, strict=True):
            assert_same_bits(mean, expect)


# --- peers that lie ------------------------------------------------------------------------------

WORDS = st.one_of(
    st.integers(-2, 17),
    st.sampled_from([-(2**31), 2**16, 2**30, 2**31 - 2, 2**31 - 1]),
    st.integers(-(2**31), 2**31 - 1),
)  # fmt: skip
WIDE_WORDS = st.one_of(WORDS, st.integers(-(2**63), 2**63 - 1))


@dataclass(frozen=True)
class Lie:
    """What becomes of a message on its way to all ranks."""

    message: str
    words: list[tuple[int, int]]  # place, modulo the length, and content
    longer: int  # by so many words, where other ranks choose the length


class LiedTo(SimulatedTransport):
    """An end of a world in which messages are tampered with: a peer controls what a collective
    gives, and of an Alltoall and an Allgather over Horovod the length too."""

    lie = Lie("", [], 0)

    def max_async(self, tensor: Tensor, name: str) -> Handle:
        return self._tamper(super().max_async(tensor, name), name, 0)

    def sum_async(self, tensor: Tensor, name: str) -> Handle:
        return self._tamper(super().sum_async(tensor, name), name, 0)

    def alltoall_async(
        self, tensor: Tensor, splits: Sequence[int], name: str,
        received: Sequence[int] | None = None,
    ) -> Handle:  # fmt: skip
        handle = super().alltoall_async(tensor, splits, name, received)
        return self._tamper(handle, name, self.lie.longer)

    def allgather_async(self, tensor: Tensor, lengths: Sequence[int], name: str) -> Handle:
        return self._tamper(super().allgather_async(tensor, lengths, name), name, self.lie.longer)

    def _tamper(self, handle: Any, name: str, longer: int) -> Handle:
        return _Tampered(handle, self.lie, longer) if name.endswith(self.lie.message) else handle


@dataclass(frozen=True)
class _Tampered:
    handle: Handle
    lie: Lie
    longer: int

    def done(self) -> bool:
        return self.handle.done()

    def wait(self) -> Tensor:
        result = self.handle.wait().clone()
        if self.longer > 0:
            result = torch.cat([result, result.new_ones(self.longer)])
        elif self.longer < 0:
            result = result[: self.longer]
        for place, word in self.lie.words:
            if result.numel():
                info = torch.iinfo(result.dtype)
                result[place % result.numel()] = min(max(word, info.min), info.max)
        return result


@st.composite
def lies(draw: st.DrawFn) -> Lie:
    places = st.one_of(st.integers(0, 16), st.integers(0, 5000))
    return Lie(
        draw(st.sampled_from([".header", ".first", ".norms", ".squares", ".codes", ".means"])),
        draw(st.lists(st.tuples(places, WIDE_WORDS), max_size=12)),
        draw(st.sampled_from([0, 0, 0, -1, 1, -7, 1000])),
    )


LIED_TO = [
    *({"bits": bits} for bits in (5, 8, 16)),
    *({"exchange": "two_phase", "bits": bits} for bits in (4, 11)),
    *({"dither": "exponential", "bits": bits} for bits in (4, 8)),
    {"norm": "l2"},
    {"bits": DynamicBits(6)},
    {"bits": DynamicBits(6, total_steps=10), "exchange": "two_phase"},
    {"bits": BlockBits(4, block_size=64)},
    {"bits": BlockBits(6, block_size=64), "exchange": "allreduce"},
    {"bits": BlockBits(DynamicBits(5), block_size=64)},
]


@pytest.mark.parametrize("ahead", [False, True])
@given(st.sampled_from(LIED_TO), st.sampled_from(DTYPES), st.sampled_from([0, 1, 50, 1500]), lies())
# Who took part; the last step; lanes too narrow for three ranks; codes for one rank alone.
@example({"bits": 8}, DTYPES[2], 50, Lie(".codes", [(0, -1)], 0))
@example({"bits": 8}, DTYPES[2], 50, Lie(".first", [(5, 2**31 - 1)], 0))
@example({"bits": 8}, DTYPES[2], 50, Lie(".first", [(5, -1)], 0))
@example({"bits": DynamicBits(6)}, DTYPES[2], 50, Lie(".first", [(6, 2)], 0))
@example({"exchange": "two_phase"}, DTYPES[2], 50, Lie(".codes", [], -1))
def test_peers_that_lie_are_refused_or_believed(
    ahead: bool, options: dict[str, Any], dtype: torch.dtype, numel: int, lie: Lie
) -> None:
    """Any words in any message, and messages of any length: a gradient or an ``AgreementError``, in
    this step and in those that go on from what was settled on in it."""
    n = 3
    if ahead:  # what ranks have agreed on gives all lengths
        lie = replace(lie, longer=0)
    world = SimulatedWorld(n)
    ends = [LiedTo(world, rank) for rank in range(n)]
    ranks = [
        Pipeline(Options(block_size=64, **options), end, protocol=Ahead if ahead else WithNorms)
        for end in ends
    ]
    x = torch.ones(numel, dtype=dtype)
    for told in (lie, Lie("nothing", [], 0)):
        for end in ends:
            object.__setattr__(end, "lie", told)
        tickets = [pipeline.submit(x) for pipeline in ranks]
        for pipeline in ranks:
            pipeline.flush()
        for _ in range(6):
            for pipeline in ranks:
                pipeline.advance()
        for pipeline, ticket in zip(ranks, tickets, strict=True):
            try:
                pipeline.wait(ticket)
                mean = pipeline.decode(ticket, 1 / n)
            except AgreementError:
                event("refused")
                continue
            assert mean.shape == x.shape
            assert mean.dtype == dtype
        del tickets, ticket


FLOATS = st.floats(allow_nan=True, allow_infinity=True)
SLOTS = st.one_of(FLOATS, st.sampled_from([0.0, 1.0, 3.0, -1.0, 1e308, -1e308, 5e-324, math.inf]))
COUNTS = st.one_of(st.integers(-4, 9), WORDS)


@given(st.lists(SLOTS, min_size=7, max_size=7), st.builds(Contribution, *[COUNTS] * 4))
@example([1e308, 1e308, 1e308, 0, 0, 0, 0], everyone(4))
def test_probes_of_any_content(slots: list[float], contribution: Contribution) -> None:
    """What is taken for a right one has the sums that it should have, in exact arithmetic."""
    reading = Reading.of(torch.tensor(slots, dtype=torch.float64))
    if not reading.matches(contribution):
        return
    one, ranks, weights = map(Fraction, slots[:3])
    for got, count in ((ranks, contribution.ranks), (weights, contribution.weights)):
        a, b = got * contribution.count, one * count
        assert abs(a - b) <= Fraction(1e-11) * max(abs(a), abs(b))
    if contribution.count > 0 and disagreement(reading, contribution) is None:
        assert math.isfinite(reading.scale(contribution.count, 4))


@given(
    st.lists(st.one_of(st.integers(0, 3), st.integers(0, WORD_MAX)), min_size=5, max_size=5),
    st.sampled_from([
        DynamicBits(), DynamicBits(3, min_bits=3), DynamicBits(7, total_steps=100),
        DynamicBits(4.5, total_steps=2**31 - 1, form="convex", contraction=1e-300),
    ]),
    st.integers(1, 3),
    st.lists(st.one_of(st.floats(allow_nan=True), st.just(0.0)), max_size=5),
)  # fmt: skip
def test_schedules_go_on_from_any_state(
    words: list[int], dynamic: DynamicBits, n: int, squared_norms: list[float]
) -> None:
    """Of which a peer may have sent any: the widths are usable, and so is the next state."""
    schedule = Schedule(dynamic)
    schedule.adopt(words)
    for squared_norm in squared_norms:
        width = schedule.width(n)
        assert width in schedule.usable(n)
        schedule.update(width, squared_norm)
        schedule.adopt(schedule.state())


INTEGERS = st.one_of(
    st.integers(-1, 17), st.sampled_from([-(2**63), 127, 1024, 2**31, 2**32 + 8, 2**63 - 1])
)


@given(
    st.integers(0, 80), st.sampled_from(DTYPES),
    # What goes well, or anything: block, kind, bits, levels, contributors, tiles.
    st.tuples(*(
        st.one_of(st.integers(low, high), st.integers(low, high), INTEGERS)
        for low, high in ((1, 30), (0, 1), (2, 16), (0, 7), (1, 2), (0, 1), (1, 3))
    )),
    st.lists(st.sampled_from([0] * 12 + [1, -1]), min_size=4, max_size=4),
)  # fmt: skip
def test_ops_take_or_refuse_any_arguments(
    numel: int, dtype: torch.dtype, arguments: tuple[int, ...], wrong: list[int]
) -> None:
    """With buffers of the right length or of another one: ``make sanitize`` sees who leaves one."""
    block, *code, contributors, first, last = arguments
    bits = code[1]
    norm, word = layout.norm_dtype(dtype), torch.int32
    lengths = [5, 5, 5, 5]
    if block > 0 and 2 <= bits <= 16:
        word = layout.word_dtype(bits)
        tiles = layout.tiles_for(numel, block)
        edges = [min(max(tile, 0), tiles) for tile in (first, last)]
        words = [layout.words_before(tile, numel, block, bits) for tile in edges]
        means = [layout.means_before(tile, numel, block, bits, norm) for tile in edges]
        lengths = [-(-numel // block), layout.words_for(numel, block, bits)]
        lengths += [words[1] - words[0], means[1] - means[0]]
    shared, whole, part, mean = (
        torch.full((max(length + off, 0),), -77, dtype=kind)
        for length, off, kind in zip(
            lengths,
            wrong,
            (norm, word, word, max(norm, word, key=lambda d: d.itemsize)),
            strict=True,
        )
    )
    x = torch.ones(numel, dtype=dtype)
    for call in (
        lambda: ops.quantize(x, shared, whole, block, *code, 0, 0, 0, first, last, True),
        lambda: ops.dequantize(whole, shared, x, block, *code, contributors, 0.5),
        lambda: ops.dequantize_means(mean, shared, x, block, *code, first, last, 0.5),
        lambda: ops.requantize(
            part.expand(3, -1), shared, mean, numel, block, *code, first, last, 0, 0, 0
        ),
    ):
        try:
            call()
            event("taken")
        except (TypeError, ValueError):
            event("refused")
