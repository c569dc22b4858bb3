"""The pipeline between several ranks of one process: right sums, agreement and failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DTYPES
from simulated_ranks import (
    Elastic,
    Group,
    Named,
    Watched,
    check_unnamed,
    expected,
    gradients,
    same,
)
from torch import Tensor

from hvd_gqsgd.bucket import kind_of
from hvd_gqsgd.engine.agreement import HEADER
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.exchanges.contribution import MARKS, rank_weight
from hvd_gqsgd.option_differences import mark_words
from hvd_gqsgd.options import Options
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.transports.base import Handle
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

FLOAT, DOUBLE = (kind_of(dtype, torch.device("cpu")) for dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_mixed_types(size: int) -> None:
    """All types in one step, in two kinds of buckets: norms are 32 or 64 bits wide."""
    tensors: list[list[Named]] = [[] for _ in range(size)]
    for numel in (2000, 1, 0, 1025):
        for dtype in DTYPES:
            for own, more in zip(tensors, gradients(size, [(None, numel)], dtype), strict=True):
                own += more
    kept = [[x.clone() for _, x in own] for own in tensors]
    group = Group(size, exchange="allreduce")
    check_unnamed(group.exchange(tensors), tensors)
    check_unnamed(group.exchange(tensors), tensors, step=1)
    for own, before in zip(tensors, kept, strict=True):
        assert all(same(x, y) for (_, x), y in zip(own, before, strict=True))


@pytest.mark.parametrize("bits", range(3, 17))
def test_widths(bits: int) -> None:
    """Words of 32 and of 64 bits."""
    tensors = gradients(3, [(None, 1500), (None, 7)])
    group = Group(3, bits=bits, exchange="allreduce")
    check_unnamed(group.exchange(tensors), tensors, bits=bits)


@pytest.mark.parametrize(
    ("numels", "sent_off"),
    [
        ([1024], [1]),
        ([1023], [0]),
        ([1023, 1], [0, 1]),
        ([1023, 2], [0, 1]),
        ([512, 511, 1], [0, 0, 1]),
        ([5000, 1], [1, 1]),
        ([1024, 1024, 1023], [1, 2, 2]),
        ([0, 0, 1024, 0], [0, 0, 1, 1]),
    ],
)
def test_bucket_boundaries(numels: list[int], sent_off: list[int]) -> None:
    """A bucket goes with the tensor that makes it full to the byte, and not before."""
    tensors = gradients(2, [(None, numel) for numel in numels])
    group = Group(2, transport=Watched, bucket_mb=4096 / 2**20)
    tickets: list[list[Ticket]] = [[], []]
    for pipeline, own, out in zip(group.ranks, tensors, tickets, strict=True):
        for (_, x), buckets in zip(own, sent_off, strict=True):
            out.append(pipeline.submit(x))
            started = group.transports[pipeline is group.ranks[1]].started
            assert sum(name.endswith(".first") for name in started) == buckets
    group.settle()
    means = [[], []]
    for pipeline, own, out in zip(group.ranks, tickets, means, strict=True):
        for ticket in own:
            pipeline.wait(ticket)
            out.append(pipeline.decode(ticket, 0.5))
    check_unnamed(means, tensors)


@pytest.mark.parametrize("order", range(10))
def test_operations_are_counted_alike(order: int) -> None:
    """However the ranks are interleaved, they have started equally many operations at each point.

    Horovod names what is left unnamed by such a count.
    """
    tensors = gradients(3, [(None, 300)] * 12)
    group = Group(3, transport=Watched, bucket_mb=2000 / 2**20)
    tickets: list[list[Ticket]] = [[], [], []]
    counts: list[list[int]] = [[], [], []]
    rng = np.random.default_rng(order)
    for rank in rng.permutation(np.repeat(range(3), 12)):
        _, x = tensors[rank][len(tickets[rank])]
        tickets[rank].append(group.ranks[rank].submit(x))
        counts[rank].append(len(group.transports[rank].started))
    group.settle()
    means: list[list[Tensor]] = [[], [], []]
    for rank in rng.permutation(np.repeat(range(3), 12)):
        ticket = tickets[rank][len(means[rank])]
        group.ranks[rank].wait(ticket)
        counts[rank].append(len(group.transports[rank].started))
        means[rank].append(group.ranks[rank].decode(ticket, 1 / 3))
    assert counts[0] == counts[1] == counts[2]
    check_unnamed(means, tensors)
    for transport in group.transports:
        assert len(set(transport.started)) == len(transport.started)


# --- names and plans -----------------------------------------------------------------------------


def test_plan() -> None:
    """Buckets fill by kind, and one is closed by the tensor that makes it full."""
    plan = BucketPlan.of(
        [("a", FLOAT, 50), ("b", DOUBLE, 10), ("c", FLOAT, 50), ("d", FLOAT, 99), ("e", FLOAT, 1),
         ("f", FLOAT, 300), ("g", DOUBLE, 10)],
        100,
    )  # fmt: skip
    assert {name: number for name, (number, _) in plan.places.items()} == {
        "a": 0, "b": 1, "c": 0, "d": 2, "e": 2, "f": 3, "g": 1,
    }  # fmt: skip
    assert plan.sizes == [2, 2, 2, 1]
    positions = [position for _, position in plan.places.values()]
    assert positions == sorted(set(positions))


SHAPES = [("a", 1000), ("b", 24), ("c", 2000), ("d", 5), ("e", 1024), ("f", 300)]


def plan_of(shapes: Sequence[tuple[str, int]], bucket_bytes: int = 4096) -> BucketPlan:
    """All in float32."""
    return BucketPlan.of([(name, FLOAT, 4 * numel) for name, numel in shapes], bucket_bytes)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_with_a_plan(seed: int) -> None:
    """Each rank has an order of its own."""
    rng = np.random.default_rng(seed)
    tensors = gradients(3, SHAPES)
    right = {
        name: expected([own[i][1] for own in tensors], name) for i, (name, _) in enumerate(SHAPES)
    }
    shuffled = [[own[i] for i in rng.permutation(len(own))] for own in tensors]
    means = Group(3, plan=plan_of(SHAPES)).exchange(shuffled)
    for own, results in zip(shuffled, means, strict=True):
        for (name, _), mean in zip(own, results, strict=True):
            assert same(mean, right[name]), name


def test_unused_and_unknown_names() -> None:
    """What never comes does not hold up its bucket; what no plan knows goes by order of arrival."""
    tensors = gradients(2, [("c", 2000), ("new", 50), ("a", 1000), (None, 60), ("e", 1024)])
    means = Group(2, plan=plan_of(SHAPES)).exchange(tensors)
    for i, label in enumerate(["c", "new", "a", 0, "e"]):
        right = expected([own[i][1] for own in tensors], label)
        assert all(same(own[i], right) for own in means), label


def test_a_name_twice_in_a_step() -> None:
    """Both are right, and have dither of their own."""
    tensors = gradients(2, [("a", 1000)])
    twice = [own + own for own in tensors]
    means = Group(2, plan=plan_of(SHAPES)).exchange(twice)
    for repeat in (0, 1):
        right = expected([own[0][1] for own in tensors], "a", repeat=repeat)
        assert all(same(own[repeat], right) for own in means)
    assert not same(means[0][0], means[0][1])


def test_other_order_without_a_plan() -> None:
    """All ranks are told, and how to help it; and then all go on."""
    tensors = gradients(3, [(None, 100), (None, 200)])
    group = Group(3)
    other = [tensors[0], tensors[1][::-1], tensors[2]]
    for message in group.errors(other):
        assert "different tensors, or in another order" in message
        assert "named_parameters" in message
    check_unnamed(group.exchange(tensors), tensors, step=1)


def test_other_types_without_a_plan() -> None:
    """Same lengths, but float16 where the others have bfloat16."""
    halves = gradients(2, [(None, 100)], torch.float16)
    others = gradients(2, [(None, 100)], torch.bfloat16)
    for message in Group(2).errors([halves[0], others[1]]):
        assert "different tensors" in message


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 4},
        {"bits": 16},
        {"block_size": 2000},
        {"block_size": None},
        {"correlated": False},
        {"seed": 1},
        {"min_numel": 1},
        {"bucket_mb": 24.0},
    ],
    ids=str,
)
def test_other_options(other: dict[str, Any]) -> None:
    """Any option that differs on one rank is an error on all, which shows each its own value."""
    tensors = gradients(3, [(None, 1000)])
    messages = Group(3, options=[{}, other, {}]).errors(tensors)
    ((name, value),) = other.items()
    for rank, message in enumerate(messages):
        own = value if rank == 1 else getattr(Options(), name)
        assert f"the ranks use different options: {name}; pass" in message
        assert message.endswith(f"This rank has {name}={own!r}")


def test_two_other_options() -> None:
    """And values that look alike in the header."""
    tensors = gradients(2, [(None, 1000)])
    for message in Group(2, options=[{"seed": 1}, {"bits": 4}]).errors(tensors):
        assert "the ranks use different options: bits, seed; pass" in message
    first = mark_words(Options(seed=1))
    alike = next(seed for seed in range(2, 40) if mark_words(Options(seed=seed)) == first)
    for message in Group(2, options=[{"seed": 1}, {"seed": alike}]).errors(tensors):
        assert "the ranks use different options, or builds that exchange in" in message
        assert "This rank has bits=8, dither='linear'" in message


def test_two_pipelines_at_once() -> None:
    """Two optimizers' messages do not get mixed up, whichever is waited for first."""
    tensors = gradients(2, [(None, 1000)])
    world = SimulatedWorld(2)
    spaces = [OperationNames(), OperationNames()]
    one, two = (
        [Pipeline(Options(seed=seed), world.transport(r), names=spaces[r]) for r in range(2)]
        for seed in (0, 1)
    )
    tickets = [
        [pipelines[rank].submit(tensors[rank][0][1]) for pipelines in (one, two)]
        for rank in range(2)
    ]
    for pipeline in (*one, *two[::-1]):
        pipeline.flush()
    for pipeline in (*two, *one):
        pipeline.advance()
    results = []
    for rank in range(2):
        for pipelines, ticket in zip((one, two), tickets[rank], strict=True):
            pipelines[rank].wait(ticket)
            results.append(pipelines[rank].decode(ticket, 0.5))
    assert same(results[0], expected([own[0][1] for own in tensors], 0))
    assert same(results[0], results[2])
    assert same(results[1], results[3])
    assert not same(results[0], results[1])


# --- who takes part, and what is counted ---------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.5, -2.0])
def test_a_rank_that_has_joined(scale: float) -> None:
    """It adds zeros to everything, is not counted, and the others' sum is right."""

    class Joined(SimulatedTransport):
        """Rank 2 has nothing to say any more: rank 1 starts its zeros."""

        def max_async(self, tensor: Tensor, name: str) -> Handle:
            if self.rank == 1:
                SimulatedTransport(self.world, 2).max_async(torch.zeros_like(tensor), name)
            return super().max_async(tensor, name)

        def sum_async(self, tensor: Tensor, name: str) -> Handle:
            if self.rank == 1:
                SimulatedTransport(self.world, 2).sum_async(torch.zeros_like(tensor), name)
            return super().sum_async(tensor, name)

    group = Group(3, transport=Joined)
    group.ranks.pop()
    rows = torch.rand(2, 1000) - 0.5
    tickets = group.submit([[(None, row)] for row in rows])
    group.settle()
    results = []
    for pipeline, (ticket,) in zip(group.ranks, tickets, strict=True):
        contribution = pipeline.wait(ticket)
        assert contribution.count == 2
        assert contribution.ranks == 0 + 1
        assert contribution.weights == rank_weight(0) + rank_weight(1)
        results.append(pipeline.decode(ticket, scale))
    assert same(*results)
    level = rows.abs().max() / reference.levels(8, 3)
    assert (results[0] - scale * rows.sum(0)).abs().max() < abs(scale) * 2 * level


def test_bytes() -> None:
    """Norms, words and headers are counted, and filled slots where there are any."""
    group = Group(2, bits=4, exchange="allreduce", block_size=100, transport=Watched)
    group.exchange(gradients(2, [(None, 1000), (None, 50)]))
    double = gradients(2, [(None, 10)], torch.float64)
    group.exchange(double)
    for pipeline in group.ranks:
        stats = pipeline.stats
        assert stats.steps == 2
        assert stats.compressed_bytes_before == 4 * 1050 + 8 * 10
        # 100 elements take 13 words of 8 lanes.
        first = 4 * (HEADER + 11) + 4 * (MARKS + 10 * 13 + 7)
        second = 8 * (HEADER + 1) + 4 * (MARKS + 2)
        assert stats.compressed_bytes_on_wire == first + second


# --- failures of the transport -------------------------------------------------------------------


class Broken:
    """An operation that fails as soon as it is looked at."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise OSError("the cable is cut")


@pytest.mark.parametrize("operation", ["max_async", "sum_async"])
def test_failures_wait_for_wait(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else raises: in a backward pass it would leave the other ranks waiting."""
    tensors = gradients(2, [(None, 1500)] * 10)
    group = Group(2, bucket_mb=4096 / 2**20, transport=Elastic)
    with monkeypatch.context() as patch:
        patch.setattr(SimulatedTransport, operation, lambda self, tensor, name: Broken())
        tickets = group.submit(tensors)
        group.settle()
        group.settle()
        for pipeline, own in zip(group.ranks, tickets, strict=True):
            with pytest.raises(OSError, match="the cable is cut"):
                pipeline.wait(own[-1])
            with pytest.raises(RuntimeError, match="not in flight"):
                pipeline.wait(own[0])
        del own, tickets
    group.world = SimulatedWorld(2)
    for rank, transport in enumerate(group.transports):
        transport.end = group.world.transport(rank)
    check_unnamed(group.exchange(tensors), tensors, step=1)


def test_waiting_for_a_rank_that_has_not_started() -> None:
    """Simulated ranks share a thread, so it would never end."""
    group = Group(2)
    ticket = group.ranks[0].submit(torch.ones(10))
    with pytest.raises(RuntimeError, match="before all simulated ranks had started"):
        group.ranks[0].wait(ticket)
