"""Exchanges by node: the bits of nodes' sums, the bytes of each part, and what is refused."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from helpers import DTYPES, bits_of, name
from simulated_ranks import Elastic, Group
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, layout, simulate
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.frontends.fsdp import SHARDED
from hvd_gqsgd.nodes import Nodes, nodes_of_hosts, nodes_of_sizes, one_node
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

OPERATORS: list[dict[str, Any]] = [
    {}, {"bits": 3, "block_size": 100}, {"bits": 11}, {"norm": "l2"}, {"block_size": None},
    {"bits": 5, "exchange": "allreduce"}, {"correlated": False, "block_size": 3000},
    {"dither": "exponential"}, {"dither": "exponential", "bits": 4, "norm": "l2"},
]  # fmt: skip
BLOCKS: list[dict[str, Any]] = [
    {"bits": BlockBits(4)}, {"bits": BlockBits(5, block_size=96)},
    {"bits": BlockBits(4), "exchange": "allreduce"}, {"bits": BlockBits(DynamicBits(4))},
]  # fmt: skip
NODES = [(2, 2), (4, 4), (2, 2, 2), (1, 3), (3, 5), (1, 1, 2)]


def rows_for(nodes: tuple[int, ...], numel: int = 5003, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(nodes), numel, generator=generator) * torch.logspace(-3, 3, numel)


def sums_of(rows: Tensor, nodes: tuple[int, ...]) -> Tensor:
    """In the order of the ranks, as a node adds them up."""
    exact = rows.double() if rows.dtype == torch.float64 else rows.float()
    sums = []
    for part in exact.split(list(nodes)):
        total = part[0].clone()
        for other in part[1:]:
            total += other
        sums.append(total)
    return torch.stack(sums)


def test_nodes_of_hosts() -> None:
    nodes = nodes_of_hosts((7, 9, 7, 9, 9))
    assert nodes.members == ((0, 2), (1, 3, 4))
    assert nodes.shards == 2 and nodes.pays and not nodes.flat
    assert [nodes.shard(rank) for rank in range(5)] == [0, 0, 1, 1, None]
    assert nodes.owners(1) == (2, 3)
    assert nodes.of(4) == (1, 3, 4)


@pytest.mark.parametrize(
    ("nodes", "flat", "pays"),
    [
        (one_node(4), True, False),
        (nodes_of_sizes((1, 1, 1), 3), True, False),
        (nodes_of_sizes((1, 3), 4), False, False),  # one rank would own the whole bucket
        (nodes_of_sizes((2, 3), 5), False, True),
    ],
)
def test_where_it_pays(nodes: Nodes, flat: bool, pays: bool) -> None:
    assert (nodes.flat, nodes.pays) == (flat, pays)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("tensors", [((5000, 1024),), ((0, 1),), ((10, 3), (0, 3), (7, 3))])
def test_shards_are_runs_of_whole_blocks(count: int, tensors: tuple[tuple[int, int], ...]) -> None:
    shards = layout.shards(tensors, count)
    covered: dict[int, int] = dict.fromkeys(range(len(tensors)), 0)
    blocks = 0
    for shard in shards:
        assert shard.norms.start == blocks
        for tensor, first, last in shard.parts:
            assert first == covered[tensor] < last and first % tensors[tensor][1] == 0
            covered[tensor] = last
            blocks += -(-(last - first) // tensors[tensor][1])
        assert shard.norms.stop == blocks
    assert list(covered.values()) == [numel for numel, _ in tensors]
    sizes = [shard.norms.stop - shard.norms.start for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_bits_are_those_of_the_sums_of_nodes(options: dict[str, Any], dtype: torch.dtype) -> None:
    """As of so many ranks in two phases, or in the exchange that was asked for, however ranks are
    spread and a tensor is cut: the factor n/N is a power of two here, and so exact."""
    for nodes in [(2, 2), (4, 4), (2, 2, 2), (1, 3), (1, 1, 2, 4)]:
        rows = rows_for(nodes).to(dtype)
        got = simulate(rows, step=5, seed=3, nodes=nodes, hierarchy="node", **options)
        assert got.dtype == dtype
        sums = sums_of(rows, nodes)
        exchange = options.get("exchange", "two_phase")
        expected = simulate(sums, step=5, seed=3, **(options | {"exchange": exchange}))
        per_node = len(rows) // len(nodes)
        if dtype == sums.dtype:
            assert torch.equal(bits_of(got), bits_of(expected / per_node)), nodes
        else:  # a tensor of another type has another dither
            mean, limit = sums.sum(0) / len(rows), (expected / per_node - sums.mean(0) / per_node)
            assert (got.float() - mean).norm() < 1.3 * limit.norm() + 0.01 * mean.norm()


@pytest.mark.parametrize("options", [*OPERATORS, *BLOCKS], ids=str)
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_it_is_the_mean(nodes: tuple[int, ...], options: dict[str, Any]) -> None:
    """Averages over seeds come near it, on all ranks alike; one seed alone does not."""
    rows = rows_for(nodes, 700)
    mean, seeds = rows.mean(0), 60
    runs = torch.stack(
        [simulate(rows, seed=k, nodes=nodes, hierarchy="node", **options) for k in range(seeds)]
    )
    error = (runs.mean(0) - mean).norm()
    expected = (runs - mean).norm(dim=1).mean() / seeds**0.5
    # The norm of 700 errors varies by some per cent; a false alarm is far below 1e-6.
    assert error < 1.5 * expected + 1e-6 * mean.norm()
    if expected > 1e-5 * mean.norm():
        assert (runs[0] - mean).norm() > 2 * error  # the negative control


def test_error_is_that_of_as_many_ranks_as_nodes() -> None:
    """At 8 bits, of 2 nodes of 4 ranks as of 2 ranks, and a fraction of a flat Allreduce's."""
    errors: dict[str, float] = {}
    for seed in range(20):
        rows = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(seed))
        mean, pairs = rows.mean(0), rows.view(2, 4, -1).mean(1)
        for kind, got in {
            "node": simulate(rows, nodes=(4, 4), hierarchy="node", exchange="allreduce", seed=seed),
            "two": simulate(pairs, exchange="allreduce", seed=seed),
            "flat": simulate(rows, exchange="allreduce", seed=seed),
        }.items():
            errors[kind] = errors.get(kind, 0.0) + float((got - mean).square().sum())
    assert errors["node"] == pytest.approx(errors["two"], rel=0.05)
    assert errors["node"] < 0.2 * errors["flat"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank", range(5))
def test_not_finite_on_one_rank(rank: int, value: float) -> None:
    """Its block is NaN on all ranks, and no other block."""
    rows = rows_for((2, 3))
    rows[rank, 2000] = value
    got = simulate(rows, nodes=(2, 3), hierarchy="node", exchange="two_phase")
    assert got[1024:2048].isnan().all()
    assert got[:1024].isfinite().all() and got[2048:].isfinite().all()


@pytest.mark.parametrize("bucket_mb", [25, 0.01, 1e-6])
def test_bits_do_not_depend_on_the_bucket(bucket_mb: float) -> None:
    """Types and sizes mixed, some tensors in more than one shard and some shards empty."""
    numels, nodes = [0, 1, 9000, 30, 2048], (2, 2)
    dtypes = [torch.float32, torch.float16, torch.float32, torch.bfloat16, torch.float16]
    everyone = [
        [
            torch.randn(numel, generator=torch.Generator().manual_seed(10 * rank + i)).to(dtype)
            for i, (numel, dtype) in enumerate(zip(numels, dtypes, strict=True))
        ]
        for rank in range(4)
    ]
    named = [[(f"t{i}", x) for i, x in enumerate(tensors)] for tensors in everyone]
    options = Options(hierarchy="node", bucket_mb=bucket_mb)
    means = SimulatedRanks(4, options, nodes=nodes).means(named)
    alone = [
        SimulatedRanks(4, options, nodes=nodes).means([[mine[i]] for mine in named])[0]
        for i in range(len(numels))
    ]
    for mean, expected, tensors in zip(means, alone, zip(*everyone, strict=True), strict=True):
        assert torch.equal(mean, expected)
        exact = torch.stack(tensors).float().mean(0)
        torch.testing.assert_close(mean.float(), exact, rtol=0, atol=0.05)


def test_bytes_inside_and_between() -> None:
    """A rank's share of what its node sends, to the byte."""
    numel, nodes = 8 * 1024 * 16, (4, 4)
    ranks = SimulatedRanks(8, Options(hierarchy="node"), nodes=nodes)
    ranks.means([[("", row)] for row in rows_for(nodes, numel)])
    flag, norms = 64, 4 * numel // 1024
    codes = numel // 4  # a shard at 8 bits
    means = codes + 4 * (numel // 4 // 1024) + 2 * 4  # norms, and a flag of each node
    hosts = 8 * (16 + 8)  # and the header
    between = hosts + norms + codes // 2 + 2 * (means // 2) // 2 + 4  # whether a rank failed
    assert ranks.stats.compressed_bytes_on_wire == between
    last = -(-means // 64) * 64
    inside = 3 * (flag + numel) // 2 + 3 * (flag + last) // 2  # for the other ranks
    assert ranks.stats.bytes_inside == inside
    assert f"within nodes: {inside:,} bytes" in str(ranks.stats)


@pytest.mark.parametrize(
    ("hierarchy", "nodes", "by_node"),
    [
        ("auto", (2, 2), True), ("auto", (1, 3), False), ("auto", (4,), False),
        ("flat", (2, 2), False), ("node", (1, 3), True), ("node", (4,), False),
        ("node", (1, 1, 1, 1), False), ((2, 2), (4,), True), ((4,), (2, 2), False),
    ],
)  # fmt: skip
def test_where_it_is_taken(hierarchy: Any, nodes: tuple[int, ...], by_node: bool) -> None:
    rows = rows_for(nodes)
    got = simulate(rows, bits=4, hierarchy=hierarchy, nodes=nodes)
    flat = simulate(rows, bits=4, hierarchy="flat")
    assert torch.equal(got, flat) != by_node


def test_an_allreduce_stays_flat() -> None:
    """With "auto", as it may add up within nodes by itself; 8 bits are one on up to 4 ranks."""
    rows = rows_for((2, 2))
    for options in ({}, {"exchange": "allreduce"}):
        got = simulate(rows, nodes=(2, 2), **options)  # type: ignore[call-overload]
        assert torch.equal(got, simulate(rows))
    assert not torch.equal(simulate(rows, nodes=(2, 2), hierarchy="node"), simulate(rows))


def test_ranks_in_any_order() -> None:
    """Hosts may have their ranks in turns; the sums of nodes are the same."""
    order = [0, 3, 1, 2, 4, 5]  # of nodes (0, 2, 3) and (1, 4, 5): their owners cross
    hosts = [0, 1, 0, 0, 1, 1]
    rows = rows_for((3, 3))
    world = SimulatedWorld(6, nodes_of_hosts(tuple(hosts)))
    options = Options(hierarchy="node", exchange="two_phase")
    ranks = [Pipeline(options, world.transport(rank)) for rank in range(6)]
    by_host = sorted(range(6), key=lambda rank: (hosts[rank], rank))
    tickets: list[Any] = [None] * 6
    for rank in order:
        tickets[rank] = ranks[rank].submit(rows[by_host.index(rank)].contiguous())
    for pipeline in ranks:
        pipeline.flush()
    for _ in range(10):
        arrived = [p.poll(t) is not None for p, t in zip(ranks, tickets, strict=True)]
    assert all(arrived)
    expected = simulate(rows, nodes=(3, 3), hierarchy="node", exchange="two_phase")
    for pipeline, ticket in zip(ranks, tickets, strict=True):
        assert torch.equal(pipeline.decode(ticket, 1 / 6), expected)


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": DynamicBits(6)}], ids=str)
@pytest.mark.parametrize(
    ("before", "after"), [((2, 2), (1, 3)), ((2, 2), (4,)), ((4,), (2, 2)), ((2, 2), (2, 2, 2))]
)
def test_a_state_resumes_on_other_nodes(
    before: tuple[int, ...], after: tuple[int, ...], options: dict[str, Any]
) -> None:
    """It has no nodes in it: the next step has the bits of the nodes that there are then."""

    def group(nodes: tuple[int, ...]) -> Group:
        world = SimulatedWorld(sum(nodes), nodes_of_sizes(nodes, sum(nodes)))
        return Group(
            sum(nodes), transport=lambda _, rank: world.transport(rank), hierarchy="node", **options
        )

    first, second = group(before), group(after)
    for step in range(2):
        first.exchange([[(None, row)] for row in rows_for(before, seed=step)])
    state = first.ranks[0].steps.state_dict()
    for pipeline in second.ranks:
        pipeline.steps.load_state_dict(state)
    rows = rows_for(after, seed=2)
    means = [mean for (mean,) in second.exchange([[(None, row)] for row in rows])]
    expected = simulate(
        rows,
        step=2,
        nodes=after,
        hierarchy="node",
        **options | {"bits": second.ranks[0].stats.bits},
    )
    assert all(torch.equal(mean, expected) for mean in means)


def test_nodes_change_with_the_ranks() -> None:
    """As in an elastic job, also in the midst of a step: the next one has the bits of the nodes
    that there are then."""
    ends = [Elastic(SimulatedWorld(4), rank) for rank in range(4)]
    everyone = [Pipeline(Options(hierarchy="node"), end) for end in ends]
    for number, nodes in enumerate([(2, 2), (2,), (1, 2), (1, 1), (3, 1), (2, 2)]):
        size = sum(nodes)
        world = SimulatedWorld(size, nodes_of_sizes(nodes, size))
        for rank in range(size):
            ends[rank].end = world.transport(rank)
        ranks, rows = everyone[:size], rows_for(nodes, seed=number)
        tickets = [pipeline.submit(row) for pipeline, row in zip(ranks, rows, strict=True)]
        for pipeline in ranks:
            pipeline.flush()
        arrived = [False]
        while not all(arrived):
            arrived = [p.poll(t) is not None for p, t in zip(ranks, tickets, strict=True)]
        expected = simulate(rows, step=2 * number, nodes=nodes, hierarchy="node")
        for pipeline, ticket in zip(ranks, tickets, strict=True):
            assert torch.equal(pipeline.decode(ticket, 1 / size), expected), nodes
        lost = [pipeline.submit(row) for pipeline, row in zip(ranks, rows, strict=True)]
        for pipeline in ranks[:-1]:
            pipeline.flush()
        del lost


class Unknown(SimulatedTransport):
    """Ranks that must tell each other their hosts, as under Horovod."""

    @property
    def nodes(self) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("hosts", [(5, 5, 6, 6), (5, 6, 5, 6), (5, 5, 5, 6), (5, 5, 5, 5)])
@pytest.mark.parametrize("options", [
    {}, {"bits": 4}, {"hierarchy": "node"}, {"hierarchy": "node", "exchange": "allreduce"},
], ids=str)  # fmt: skip
def test_hosts_that_ranks_tell(
    monkeypatch: pytest.MonkeyPatch, hosts: tuple[int, ...], options: dict[str, Any]
) -> None:
    """As with nodes that are known; where they do not pay, in the flat exchange."""
    numbers = itertools.cycle(hosts)
    monkeypatch.setattr("hvd_gqsgd.exchanges.by_node.host_number", lambda: next(numbers))
    group = Group(4, transport=Unknown, **options)
    rows = rows_for((2, 2))
    means = group.exchange([[(None, row)] for row in rows])
    nodes = nodes_of_hosts(hosts)
    world = SimulatedWorld(4, nodes)
    known = Group(4, transport=lambda _, rank: world.transport(rank), **options)
    expected = known.exchange([[(None, row)] for row in rows])
    for (mean,), (other,) in zip(means, expected, strict=True):
        assert torch.equal(mean, other)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"hierarchy": "nodes"}, ValueError, "hierarchy must be one of ('auto', 'flat', 'node'), "
         "or the number of ranks of each node, as (8, 8), got 'nodes'"),
        ({"hierarchy": 2}, TypeError, "hierarchy must be one of"),
        ({"hierarchy": (2, 0)}, ValueError, "the ranks of each node of hierarchy must be from 1"),
        ({"hierarchy": "node", "exchange": "one_phase"}, ValueError, "hierarchy='node' has no eff"),
        ({"hierarchy": (3, 2)}, ValueError, "the ranks of the nodes (3, 2) must add up to the "
         "number of ranks, 4, got 5"),
        ({"nodes": (2, 3)}, ValueError, "must add up to the number of ranks, 4, got 5"),
        ({"hierarchy": (2, 2), "bits": 2, "exchange": "allreduce"}, ValueError, "for 2 ranks"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=re.escape(match)):
        simulate(torch.ones(4, 100), **options)


def test_lanes_have_room_for_nodes() -> None:
    """3 bits hold the sum of 2 nodes, and not that of 4 ranks."""
    rows = torch.ones(4, 100)
    options: dict[str, Any] = {"bits": 3, "exchange": "allreduce"}
    with pytest.raises(ValueError, match="bits=3 is too narrow"):
        simulate(rows, nodes=(2, 2), hierarchy="flat", **options)
    assert torch.equal(simulate(rows, nodes=(2, 2), hierarchy="node", **options), rows[0])


def test_fsdp_takes_no_hierarchy() -> None:
    with pytest.raises(TypeError, match="takes no option 'hierarchy': shard within nodes"):
        SHARDED.options({"hierarchy": "node"})


def test_repr() -> None:
    assert "hierarchy=(2, 2)" in repr(GlobalQSGD(hierarchy=[2, 2]))  # type: ignore[arg-type]


def test_all_cases_are_covered() -> None:
    """Shards of every number of nodes and ranks decode to the mean of equal gradients."""
    for nodes in itertools.product([1, 2, 3], repeat=3):
        rows = torch.ones(sum(nodes), 3000)
        got = simulate(rows, nodes=nodes, hierarchy="node")
        torch.testing.assert_close(got, rows[0], rtol=0, atol=0.02)  # 2 of 127 levels
