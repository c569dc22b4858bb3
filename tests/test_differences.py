"""MARINA: compressed differences between gradients, and whole gradients in some steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from helpers import same_bits
from test_feedback import relative, step
from test_selections import MOST, ranks
from torch import Tensor

from hvd_gqsgd import BlockBits, DynamicBits
from hvd_gqsgd.bench.wire import wire_bytes_of
from hvd_gqsgd.engine.agreement import AgreementProtocol, Ahead, WithNorms
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.exchanges.differences import is_whole
from hvd_gqsgd.options import LEAST_LEVELS, Options, levels_of
from hvd_gqsgd.selections import RandomSelection
from hvd_gqsgd.simulation import SimulatedRanks, simulate
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

CPU = torch.device("cpu")
SELECTS = pytest.mark.parametrize("select", ["random", "permutation"])


def marina(**options: Any) -> Options:
    return Options(error_feedback="marina", **{"keep": 1 / 4} | options)


def test_whole_steps_are_one_in_so_many() -> None:
    """In the mean, of any steps, with a false alarm in 1e8; as many as 1 / keep by default."""
    assert marina(keep=1 / 16) == marina(keep=1 / 16, full_every=16)
    for every in (2, 16):
        coins = [is_whole(marina(full_every=every, seed=7), i) for i in range(20_000)]
        deviation = math.sqrt(20_000 * (1 - 1 / every) / every)
        assert abs(sum(coins) - 20_000 / every) < MOST * deviation
        pairs = sum(a and b for a, b in itertools.pairwise(coins))
        assert abs(pairs - 20_000 / every**2) < MOST * math.sqrt(20_000 / every**2)
        assert coins != [is_whole(marina(full_every=every, seed=8), i) for i in range(20_000)]


def compressed(
    away: Tensor, selection: RandomSelection, number: int, identities: list[int], disjoint: bool
) -> Tensor:
    """C of a row for each rank, in plain torch, for elements in whole groups."""
    result = torch.zeros_like(away)
    for rank, row in enumerate(away):
        (choice,) = selection.choose(
            [row.numel()], [number], identities, CPU, rank if disjoint else 0
        )
        kept = (choice.units[:, None] * 32 + torch.arange(32)).flatten()
        result[rank, kept] = selection.size * row[kept]
    return result


@SELECTS
@pytest.mark.parametrize("size", [2, 5])
def test_by_a_model(select: Any, size: int) -> None:
    """In float64, given the coin and the choice, at 16 bits; with fewer ranks than runs in a group,
    and with more. A step with NaN is left out."""
    options = marina(select=select, full_every=3, bits=16)
    selection = RandomSelection(4, 0, 0, size, True, unbiased=True)
    step(probe := SimulatedRanks(size, options), torch.ones(size, 4096))
    identities = list(probe.state_dicts()[0]["memory"]["turns"])
    world, own = SimulatedRanks(size, options), torch.zeros(size, 4096, dtype=torch.float64)
    rows, previous, kinds = torch.randn(12, size, 4096), torch.zeros(size, 4096), set()
    for i, gradients in enumerate(rows):
        if i == 4:
            assert step(world, gradients / 0).isnan().any()
            continue
        whole = i == 0 or is_whole(options, i)
        if whole:
            own = gradients.double()
        else:
            away = (gradients - previous).double()
            own = own + compressed(away, selection, i, identities, select == "permutation")
        previous = gradients
        assert relative(step(world, gradients), own.mean(0)) < 2e-3
        kinds.add(whole)
    assert kinds == {True, False}


class Trials(NamedTuple):
    """Steps from one state on, with other coins and choices; by trial or rank, and element."""

    errors: Tensor
    """Of the results."""
    whole: Tensor
    """Whether each step was a whole one."""
    off: Tensor
    """The errors of the ranks' estimates before."""
    away: Tensor
    """The differences between the ranks' gradients."""


def trials(options: Options, size: int, count: int) -> Trials:
    before, away, off = torch.randn(3, size, 512, generator=torch.Generator().manual_seed(1))
    after, world = before + away, SimulatedRanks(size, options)
    step(world, before)
    states, errors = world.state_dicts(), []
    for state, own in zip(states, before + off, strict=True):
        tensors = state["memory"]["tensors"]
        tensors["own"] = dict.fromkeys(tensors["own"], own)
        tensors["mean"] = dict.fromkeys(tensors["mean"], (before + off).mean(0))
    for number in range(1, count + 1):
        for state in states:
            state["step"] = number
            state["memory"]["turns"] = dict.fromkeys(state["memory"]["turns"], number)
        world.load_state_dicts(states)
        errors.append(step(world, after) - after.mean(0))
    whole = torch.tensor([is_whole(options, number) for number in range(1, count + 1)])
    return Trials(torch.stack(errors).double(), whole, off.double(), away.double())


def too_far(x: Tensor, expected: float | Tensor) -> bool:
    """Whether the mean of independent numbers is not as expected, with a false alarm in 1e8."""
    return bool((x.mean(0) - expected).abs().gt(MOST * x.std(0) / math.sqrt(len(x))).any())


@pytest.mark.parametrize(
    ("select", "size"), [("random", 3), ("permutation", 3), ("permutation", 8)]
)
def test_the_lemma(select: Any, size: int) -> None:
    """The estimate stays unbiased in steps of differences, and its squared error is (1 - p) times
    that of before and the variance of C, by its constants A and B; a factor that is off by a
    seventh, a variance that is off by 1 / m, and steps without whole ones are told."""
    m, count = 4, 300
    options = marina(keep=1 / m, select=select, full_every=2, bits=16)
    errors, whole, off, away = trials(options, size, count)
    squares, before = errors.square().sum(1), off.mean(0).square().sum()
    mean, each = away.mean(0).square().sum(), away.square().sum(1).mean()
    if select == "random":
        variance, bound = (m - 1) * mean, (m - 1) * mean
    else:
        classes = torch.stack([away[i::m].sum(0).square().sum() for i in range(min(m, size))])
        variance = m / size**2 * classes.sum() - mean
        a = m * math.ceil(size / m) / size
        bound = a * each - mean
        assert variance <= bound * (1 + 1e-9)
        assert size > m or variance == pytest.approx(bound)
        assert size % m or a == 1
    assert squares[whole].max() < 1e-3 * before
    assert not too_far(squares[~whole], before + variance)
    assert not too_far(squares, (before + variance) / 2)
    assert squares.mean() < (before + bound) / 2 * 1.1
    directions = torch.randn(512, 10, dtype=torch.float64)
    assert not too_far(errors[~whole] @ directions, off.mean(0) @ directions)

    result = errors[~whole] - off.mean(0) + away.mean(0)
    assert too_far((result * 8 / 7) @ away.mean(0), mean)
    assert too_far(squares[~whole], before + variance + mean)
    assert too_far(squares, before + variance)


def test_the_rounding_of_a_whole_step() -> None:
    """Its delta is at most THEORY's bound for any tensor, below 1 with levels enough; with 2 levels
    it is below 1 for normal numbers, and above 1 for one large number among many small ones."""
    size, block = 3, 1024
    normal, spiked = torch.randn(size, 64 * block), torch.full((size, 64 * block), 0.01)
    spiked[0, ::block] = 1

    def delta(rows: Tensor, bits: int) -> float:
        plain = {"exchange": "allreduce", "block_size": block, "correlated": False}
        error = simulate(rows, bits=bits, **plain) - rows.mean(0)
        return float(size**2 * error.square().sum() / rows.square().sum())

    levels = levels_of(8, size)
    bound = min(size * block / (4 * levels**2), math.sqrt(size * block) / levels)
    assert levels > math.sqrt(size * block) / 2
    assert max(delta(normal, 8), delta(spiked, 8)) < bound < 1
    assert levels_of(4, size) == LEAST_LEVELS == 2
    assert delta(normal, 4) < 1 < delta(spiked, 4)


@SELECTS
def test_gradients_that_stay_the_same(select: Any) -> None:
    """Differences of zero leave the estimates as they are, to the bit; each whole step brings them
    nearer, below the rounding of one step."""
    options = marina(select=select, full_every=4)
    world, rows = SimulatedRanks(4, options), torch.randn(4, 5000)
    results = [step(world, rows) for _ in range(20)]
    errors = [relative(result, rows.mean(0)) for result in results]
    for i in range(1, 20):
        if is_whole(options, i):
            assert errors[i] < 0.5 * errors[i - 1] or errors[i] < 1e-6
        else:
            assert same_bits(results[i], results[i - 1])
    assert errors[-1] < 1e-5 < 1e-3 < errors[0]


@SELECTS
def test_a_tensor_that_is_new(select: Any) -> None:
    """Its first exchange is a whole one, of its bucket alone."""
    options = marina(keep=1 / 16, select=select, full_every=1000, bits=16)
    world, rows = SimulatedRanks(3, options), torch.randn(4, 3, 2, 2048)
    for i, (a, b) in enumerate(rows.transpose(1, 2)):
        names = {"a": a, "b": b} if i == 2 else {"a": a}
        means = world.means([[(name, x[rank]) for name, x in names.items()] for rank in range(3)])
        for mean, x in zip(means, names.values(), strict=True):
            assert (relative(mean, x.mean(0)) < 0.1) == (i in (0, 2))


def arrive(pipelines: Sequence[Pipeline], tickets: Sequence[Sequence[Ticket]]) -> None:
    """Takes all buckets to their end."""
    arrived = [False]
    while not all(arrived):
        arrived = [
            pipeline.poll(ticket) is not None
            for pipeline, own in zip(pipelines, tickets, strict=True)
            for ticket in own
        ]


class Model:
    """Two ranks with a pipeline each."""

    def __init__(
        self, name: str, options: Options, steps: list[Steps], protocol: type[AgreementProtocol]
    ) -> None:
        world, self.name = SimulatedWorld(2), name
        self.ranks = [
            Pipeline(options, world.transport(rank), protocol=protocol, steps=own)
            for rank, own in enumerate(steps)
        ]

    def exchange(self, rows: Tensor, number: int) -> None:
        """Exchanges two gradients of each rank, up to their decoding."""
        self.tickets = []
        for pipeline, own in zip(self.ranks, rows, strict=True):
            pipeline.begin_step(number)
            self.tickets.append([pipeline.submit(x, f"{self.name}{i}") for i, x in enumerate(own)])
            pipeline.flush()
        arrive(self.ranks, self.tickets)

    def decode(self, rank: int) -> Tensor:
        return torch.stack([self.ranks[rank].decode(t, 0.5) for t in self.tickets[rank]])


@pytest.mark.parametrize("kind", ["marina", "ef21"])
@pytest.mark.parametrize(
    "protocols", [(Ahead, Ahead), (Ahead, WithNorms), (WithNorms, Ahead)],
    ids=["DDP", "DDP, Horovod", "Horovod, DDP"],
)  # fmt: skip
def test_two_models_of_one_memory(kind: Any, protocols: Any) -> None:
    """Rank 0 decodes the first model before the second one begins, and rank 1 after: the results of
    both are the same, and those that each model has with a memory of its own."""
    options = Options(keep=1 / 4, error_feedback=kind, bucket_mb=1e-3)
    memories = [[Steps(options.width, feedback=kind) for _ in range(2)] for _ in range(3)]
    (a, b), others = (
        [
            Model(*each, protocol)
            for *each, protocol in zip("ab", [options] * 2, of, protocols, strict=True)
        ]
        for of in (memories[:1] * 2, memories[1:])
    )
    for i, rows in enumerate(torch.randn(8, 2, 2, 2, 2000)):
        found = {}
        a.exchange(rows[0], 2 * i)
        for rank in range(1 if i % 2 else 2):
            found[a, rank] = a.decode(rank)
        b.exchange(rows[1], 2 * i + 1)
        if i % 2:
            found[a, 1] = a.decode(1)
        found |= {(b, rank): b.decode(rank) for rank in range(2)}
        for j, (model, other) in enumerate(zip((a, b), others, strict=True)):
            other.exchange(rows[j], 2 * i + j)
            for rank in range(2):
                assert same_bits(found[model, rank], other.decode(rank)), (i, j, rank)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": BlockBits(6, min_bits=4), "select": "permutation"},
        {"bits": DynamicBits(6, total_steps=60, min_bits=4), "select": "permutation"},
        {"correlated": False, "block_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_widths_and_types(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Gradients that come to a limit are followed there."""
    world, rows, change = SimulatedRanks(3, marina(**options)), *torch.randn(2, 3, 3001)
    for i in range(60):
        gradients = (rows + 0.7**i * change).to(dtype)
        mean = step(world, gradients)
    assert mean.dtype == dtype
    assert relative(mean, gradients.double().mean(0)) < 2e-3


def test_noise_adds_up() -> None:
    """Where samples differ between steps, the noise of their differences stays until the next
    whole step: 2 (m - 1) (1 - p) / p times that of the mean gradient, in the place of m - 1."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 2, 2**14, generator=generator)

    def noise(**options: Any) -> float:
        world = ranks(2, keep=1 / 8, **options)
        errors = [
            (step(world, row) - row.mean(0)).square().sum() / row.mean(0).square().sum()
            for row in rows
        ]
        return float(torch.stack(errors[100:]).mean())

    assert noise() == pytest.approx(7, rel=0.1)
    assert noise(error_feedback="marina") == pytest.approx(98, rel=0.3)


def test_bytes_on_the_wire() -> None:
    """Those of a part in most steps, and of all elements in the others."""
    options, numels = marina(keep=1 / 8, select="permutation", full_every=3), [64 * 512, 1007]
    world, before = SimulatedRanks(4, options), 0
    for i in range(12):
        world.means([[(str(n), torch.randn(n)) for n in numels] for _ in range(4)])
        whole, sent = i == 0 or is_whole(options, i), world.stats.compressed_bytes_on_wire
        assert sent - before == wire_bytes_of(options, numels, 4, whole=whole)
        before = sent


class Leaving(SimulatedTransport):
    """As Horovod's, whose ranks may leave; notes each message."""

    ranks_may_leave = True
    sent: ClassVar[list[tuple[str, int]]] = []

    def max_async(self, tensor: Tensor, name: str) -> Any:
        self.sent.append((name, tensor.numel()))
        return super().max_async(tensor, name)

    def sum_async(self, tensor: Tensor, name: str) -> Any:
        self.sent.append((name, tensor.numel()))
        return super().sum_async(tensor, name)


@SELECTS
def test_whole_messages_are_rehearsed_by_their_size(select: Any) -> None:
    """From 7 ranks on, of one size for each name, also for a bucket that has lost a tensor; once,
    and no others."""
    options = marina(select=select, full_every=1000)
    world, size = SimulatedWorld(7), 7
    pipelines = [
        Pipeline(
            options, Leaving(world, rank),
            steps=Steps(options.width, feedback=options.error_feedback),
        )
        for rank in range(size)
    ]  # fmt: skip
    Leaving.sent.clear()
    for step_names, rehearsed in (("ab", 2), ("ab", 0), ("a", 2), ("a", 0), ("ab", 0)):
        before = len(Leaving.sent)
        tickets = [[p.submit(torch.randn(3000), name) for name in step_names] for p in pipelines]
        for pipeline in pipelines:
            pipeline.flush()
        arrive(pipelines, tickets)
        for pipeline, own in zip(pipelines, tickets, strict=True):
            for ticket in own:
                pipeline.decode(ticket, 1 / size)
        names = [name for name, _ in Leaving.sent[before:]]
        assert sum(".whole." in name for name in names) == size * rehearsed
        assert not any(".remaining." in name for name in names)
        if not rehearsed:
            assert sum(".rest." in name for name in names) == 2 * size
    whole = {sent for sent in Leaving.sent if ".whole." in sent[0]}
    assert len({name for name, _ in whole}) == len(whole) == 4


def test_a_state_of_ef21() -> None:
    """Its estimates are taken over, and whole gradients are exchanged first, as those of the step
    before are not known."""
    rows = torch.randn(3, 2, 3000)
    other = ranks(2, error_feedback="ef21")
    step(other, rows[0])
    world = SimulatedRanks(2, marina(full_every=1000))
    world.load_state_dicts(other.state_dicts())
    assert relative(step(world, rows[1]), rows[1].mean(0)) < 0.05
    assert relative(step(world, rows[2]), rows[2].mean(0)) > 0.5
