"""The operators through the whole pipeline, many ranks in one process."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_gqsgd import AgreementError, DynamicBits, layout, simulate
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.base import Handle
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

RNG = np.random.default_rng
WIDE = {"deadline": None, "derandomize": True, "database": None}
TOO_SLOW = [HealthCheck.too_slow]
BLOCKS = [1, 3, 64, 1000, 1024, 1500, None]
EXPONENTIAL = [{"dither": "exponential", "bits": 8}, {"dither": "exponential", "bits": 4}]
OPERATORS = [
    {"exchange": "allreduce", "bits": 16}, {"exchange": "allreduce", "bits": 16, "norm": "l2"},
    {"exchange": "two_phase", "bits": 8}, {"exchange": "two_phase", "bits": 3, "norm": "l2"},
    *EXPONENTIAL, {"bits": DynamicBits(5)},
]  # fmt: skip


def same(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Bit for bit."""
    return bool((a.view(f"i{a.itemsize}") == b.view(f"i{b.itemsize}")).all())


@given(
    st.lists(
        st.tuples(st.integers(0, 5000), st.sampled_from([1, 7, 1000, 1024, 1500, 2500])),
        min_size=1, max_size=6,
    ),
    st.integers(2, 16), st.sampled_from([torch.int32, torch.int64]), st.integers(1, 12),
)  # fmt: skip
@settings(max_examples=200, **WIDE)
def test_segments(
    tensors: list[tuple[int, int]], bits: int, norm_dtype: torch.dtype, ranks: int
) -> None:
    """Every tile has one owner, runs differ by one tile at most, and nothing lies between them."""
    segments = layout.lay_out(tuple(tensors), bits, norm_dtype).segments(ranks)
    tiles = [
        [(part.tensor, t) for part in parts for t in range(*part.tiles)]
        for parts in segments.of_rank
    ]
    assert list(itertools.chain(*tiles)) == [
        (i, t) for i, tensor in enumerate(tensors) for t in range(layout.tiles_for(*tensor))
    ]
    assert max(map(len, tiles)) - min(map(len, tiles)) <= 1
    for rank, parts in enumerate(segments.of_rank):
        assert [0, *(part.words.stop for part in parts)] == [
            *(part.words.start for part in parts), segments.words[rank]
        ]  # fmt: skip
        assert [segments.means[rank] + layout.FLAG, *(part.means.stop for part in parts)] == [
            *(part.means.start for part in parts), segments.means[rank + 1]
        ]  # fmt: skip
    words = means = 0
    for i, (numel, block) in enumerate(tensors):
        assert [part.tensor for part in segments.of_tensor[i]] == [i] * len(segments.of_tensor[i])
        count = layout.tiles_for(numel, block)
        words += layout.words_before(count, numel, block, bits)
        means += layout.means_before(count, numel, block, bits, norm_dtype)
    assert sum(segments.words) == words
    assert segments.means[-1] == means + ranks * layout.FLAG
    assert sorted(itertools.chain(*segments.of_tensor)) == sorted(
        itertools.chain(*segments.of_rank)
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_a_thousand_ranks(options: dict[str, Any]) -> None:
    """Near the mean, by what independent roundings of 1024 ranks leave."""
    rows = torch.from_numpy(RNG(0).uniform(-1, 1, (1024, 20_000)).astype(np.float32) + 3)
    error = (simulate(rows, **options).double() - rows.double().mean(0)).norm() / 3 / 20_000**0.5
    # l2 norms are some hundred times as large as the largest magnitude.
    assert error < (200 if "norm" in options else 0.3)


def test_auto_exchange() -> None:
    """Two phases once the lanes keep less than 31 levels, if that gives more."""

    def ranks_for_allreduce(**options: Any) -> int:
        resolved = Options(**options)
        return sum(resolved.exchange_for(n) == "allreduce" for n in range(1, 3000))

    assert ranks_for_allreduce() == 4  # 255 // (2 * 4) == 31
    assert ranks_for_allreduce(bits=4) == 1
    assert ranks_for_allreduce(bits=2) == 1
    assert ranks_for_allreduce(bits=16) == 1057
    assert ranks_for_allreduce(bits=DynamicBits(8.5)) == 4
    assert ranks_for_allreduce(dither="exponential") == 0
    assert ranks_for_allreduce(bits=2, exchange="allreduce") == 2999
    assert ranks_for_allreduce(bits=16, exchange="two_phase") == 0


def test_l2_norm_of_too_large_a_block() -> None:
    """Sums of squares would overflow; the size is looked at, not the memory."""
    x = torch.zeros(1).expand(2**33 + 1)
    one = Pipeline(Options(norm="l2", block_size=None), SimulatedWorld(1).transport(0))
    with pytest.raises(ValueError, match=r"norm='l2' takes blocks of at most 8589934592 elements"):
        one.submit(x)


# --- dynamic widths ------------------------------------------------------------------------------


def two_ranks(**dynamic: Any) -> list[Pipeline]:
    world = SimulatedWorld(2)
    return [Pipeline(Options(bits=DynamicBits(**dynamic)), world.transport(r)) for r in range(2)]


def exchange(ranks: list[Pipeline], x: Tensor) -> list[Tensor]:
    tickets = [rank.submit(x) for rank in ranks]
    for rank in ranks:
        rank.flush()
    for _ in range(3):
        for rank in ranks:
            rank.advance()
    for rank, ticket in zip(ranks, tickets, strict=True):
        rank.wait(ticket)
    return [rank.decode(ticket, 0.5) for rank, ticket in zip(ranks, tickets, strict=True)]


def test_ranks_that_want_other_widths_take_the_widest() -> None:
    """As after a restart from different checkpoints; from the next step on they want the same."""
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    ranks = two_ranks(budget=6, total_steps=50, min_bits=4)
    for step in range(10):
        exchange(ranks, x * 2.0**step)
    other = two_ranks(budget=6, total_steps=50, min_bits=4)
    for step in range(30):
        exchange(other, x * 0.5**step)
    ranks[1].steps.load_state_dict(other[1].steps.state_dict())
    for _ in range(10):
        one, two = exchange(ranks, x)
        assert torch.equal(bits_of(one), bits_of(two))
        assert ranks[0].stats.bits == ranks[1].stats.bits
    assert ranks[0].steps.state_dict() == ranks[1].steps.state_dict()
    assert ranks[0].steps.state_dict()["schedule"]["steps"] == 40


def test_a_width_that_the_options_do_not_allow() -> None:
    """A rank that lies about its options: an error on all ranks, and no codec of that width."""

    class Liar(SimulatedTransport):
        """Rank 0 asks for 16 bits in the header of its norms."""

        def max_async(self, tensor: Tensor, name: str) -> Handle:
            if self.rank == 0:
                tensor[7] = 16
            return super().max_async(tensor, name)

    world = SimulatedWorld(2)
    options = Options(bits=DynamicBits(budget=6, max_bits=8))
    ranks = [Pipeline(options, Liar(world, rank)) for rank in range(2)]
    tickets = [rank.submit(torch.ones(3000)) for rank in ranks]
    for rank in ranks:
        rank.flush()
    for rank, ticket in zip(ranks, tickets, strict=True):
        rank.advance()
        with pytest.raises(
            AgreementError, match=r"lanes of 16 bits; the options allow 2 to 8 bits"
        ):
            rank.wait(ticket)


def test_steps_that_teach_nothing_are_not_fatal() -> None:
    """Infinite gradients, as when a gradient scaler looks for its scale, and zeros."""
    ranks = two_ranks(budget=5)
    x = torch.ones(3000)
    for value in (torch.inf, 0.0, torch.nan, 1.0):
        one, two = exchange(ranks, x * value)
        assert torch.equal(bits_of(one), bits_of(two))
    assert ranks[0].stats.bits >= 2


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "must have the keys 'step' and 'schedule'"),
        ({"step": -1, "schedule": {}}, "step must be from 0"),
        ({"step": 0, "schedule": {}}, "must have the keys"),
        ({"step": 0, "schedule": {"colour": 1}}, "must have the keys"),
    ],
)
def test_bad_states(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_ranks()[0].steps.load_state_dict(state)


def test_states_of_the_wrong_type() -> None:
    for state in (None, []):
        with pytest.raises(TypeError, match="a state must be a dict"):
            two_ranks()[0].steps.load_state_dict(state)  # type: ignore[arg-type]


def test_no_state_while_tensors_are_in_flight() -> None:
    rank = two_ranks()[0]
    state = rank.steps.state_dict()
    ticket = rank.submit(torch.ones(10))
    with pytest.raises(RuntimeError, match="while gradients are in flight"):
        rank.steps.load_state_dict(state)
    del ticket
    rank.steps.load_state_dict(state)


def test_a_lost_step_teaches_nothing() -> None:
    """Nor does one of which a rank decoded only a part."""
    ranks = two_ranks(budget=5)
    exchange(ranks, torch.ones(3000))
    before = ranks[0].steps.state_dict()
    tickets = [[rank.submit(torch.ones(n)) for n in (3000, 200)] for rank in ranks]
    for rank in ranks:
        rank.flush()
    for _ in range(3):
        for rank in ranks:
            rank.advance()
    ranks[0].wait(tickets[0][0])
    ranks[0].decode(tickets[0][0], 0.5)
    del tickets
    schedule = ranks[0].steps.state_dict()["schedule"]
    assert schedule["steps"] == before["schedule"]["steps"] == 1


def test_says_that_a_budget_cannot_be_held(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hvd_gqsgd"):
        simulate(torch.ones(40, 10), bits=DynamicBits(5), exchange="allreduce")
    assert [record.getMessage() for record in caplog.records] == [
        "a budget of 5 bits cannot be held: the sum over 40 ranks takes lanes of 7.11111 bits at "
        "the least"
    ]


def test_a_fixed_width_has_no_schedule_to_load() -> None:
    fixed = Pipeline(Options(), SimulatedWorld(1).transport(0))
    state = fixed.steps.state_dict()
    assert state == {"step": 0, "schedule": {}}
    fixed.steps.load_state_dict({"step": 7, "schedule": {}})
    assert fixed.steps.state_dict()["step"] == 7
    with pytest.raises(ValueError, match="state of a fixed width must be empty"):
        fixed.steps.load_state_dict(two_ranks()[0].steps.state_dict())
