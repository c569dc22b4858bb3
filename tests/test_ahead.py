"""What ranks must agree on, in a message ahead of all else; many ranks in one process."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_gqsgd import AgreementError, simulate
from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.agreement import Ahead, check, refuse
from hvd_gqsgd.engine.flight import Ticket
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld

ROWS = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
OPERATORS: list[dict[str, Any]] = [
    {}, {"exchange": "two_phase"}, {"norm": "l2"}, {"dither": "exponential"},
]  # fmt: skip


def pipelines(*options: dict[str, Any], ranks: int = 3) -> list[Pipeline]:
    """One a rank, of one world; with the same options or each with its own."""
    world = SimulatedWorld(ranks)
    each = options if len(options) == ranks else options * ranks
    return [
        Pipeline(Options(**each[rank]), world.transport(rank), protocol=Ahead)
        for rank in range(ranks)
    ]


def start(ranks: list[Pipeline], rows: Tensor | list[Tensor], scale: float = 1 / 3) -> list[Ticket]:
    """Every rank hands in its row."""
    tickets = [
        rank.submit(row, scale=scale, out=torch.empty_like(row))
        for rank, row in zip(ranks, rows, strict=True)
    ]
    for rank in ranks:
        rank.flush()
    return tickets


def finish(ranks: list[Pipeline], tickets: list[Ticket]) -> list[Tensor]:
    """What each rank decodes."""
    ready = [False]
    while not all(ready):
        ready = [rank.advance() for rank in ranks]
    for rank, ticket in zip(ranks, tickets, strict=True):
        assert rank.poll(ticket) is not None
    return [rank.decode(ticket, 1 / 3) for rank, ticket in zip(ranks, tickets, strict=True)]


@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_same_bits(options: dict[str, Any]) -> None:
    ranks = pipelines(options)
    for step in (0, 7):
        for rank in ranks:
            rank.begin_step(step)
        for result in finish(ranks, start(ranks, ROWS)):
            assert torch.equal(result, simulate(ROWS, step=step, **options))


@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_a_step_that_lasts(options: dict[str, Any]) -> None:
    """Tensors are numbered through it, though all before them were decoded."""
    ranks = pipelines(options)
    for rank in ranks:
        rank.begin_step()
    first, second = (finish(ranks, start(ranks, ROWS)) for _ in range(2))
    assert not torch.equal(first[0], second[0]), "they have their own dither"
    for rank in ranks:
        rank.begin_step()
    assert torch.equal(finish(ranks, start(ranks, ROWS))[0], simulate(ROWS, step=1, **options))


@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_a_step_that_was_dropped(options: dict[str, Any]) -> None:
    """As by Ctrl-C, on all ranks, at the first message: the next one goes right."""
    ranks = pipelines(options)
    for rank in ranks:
        rank.begin_step()
    tickets = start(ranks, ROWS)
    del tickets
    for rank in ranks:
        rank.begin_step(4)
    for result in finish(ranks, start(ranks, ROWS)):
        assert torch.equal(result, simulate(ROWS, step=4, **options))


@pytest.mark.parametrize("what", ["shape", "type", "scale", "options"])
def test_disagreement(what: str) -> None:
    other = {"seed": 1} if what == "options" else {}
    ranks = pipelines({}, {}, other)
    rows = list(ROWS)
    if what == "shape":
        rows[2] = rows[2][:4000]
    if what == "type":
        rows[2] = rows[2].double()
    tickets = start(ranks[:2], rows[:2])
    tickets += start(ranks[2:], rows[2:], scale=1.0 if what == "scale" else 1 / 3)
    for rank, ticket in zip(ranks, tickets, strict=True):
        with pytest.raises(AgreementError, match=r"different (tensors|options)"):
            rank.wait(ticket)


def test_refusal() -> None:
    """And what is said in the place of an exchange."""
    world = SimulatedWorld(2)
    options = Options()
    pipeline = Pipeline(options, world.transport(0), protocol=Ahead)
    ticket = pipeline.submit(ROWS[0])
    pipeline.flush()
    refuse(world.transport(1), "gqsgd.0.0.0.header")
    with pytest.raises(AgreementError, match="could not take part"):
        pipeline.wait(ticket)
    check(SimulatedWorld(1).transport(0), options, "options")


@dataclass(frozen=True)
class LaterOptions(Options):
    """Those of a build with one more."""

    later: int = 0


class ThreadedWorld(SimulatedWorld):
    """Ranks in threads of their own, that wait for each other."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._lock = threading.Lock()

    def transport(self, rank: int) -> SimulatedTransport:
        return ThreadedTransport(self, rank)

    def start(self, *args: Any) -> Any:
        with self._lock:
            return super().start(*args)


class ThreadedTransport(SimulatedTransport):
    def idle(self, waited: float = 0.0) -> None:
        assert waited < 10
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([Options(), LaterOptions(bits=4)], "different builds of hvd_gqsgd: install the same one"),
        ([Options(), Options(bits=4, seed=1)], "different options: bits, seed; pass the same"),
    ],
    ids=["builds", "options"],
)
def test_what_ranks_differ_in(options: list[Options], message: str) -> None:
    world = ThreadedWorld(2)
    with ThreadPoolExecutor(2) as pool:
        checks = [
            pool.submit(check, world.transport(rank), own, "options")
            for rank, own in enumerate(options)
        ]
        for each in checks:
            with pytest.raises(AgreementError, match=message):
                each.result()


def test_conductors_of_different_builds() -> None:
    """All learn it, before they read the state of another build."""
    world = SimulatedWorld(3)
    each = [Options(bits="auto"), Options(bits="auto"), LaterOptions(bits="auto", error=1e-3)]
    conductors = [Conductor(options, Stats(), patience=0) for options in each]
    for rank, conductor in enumerate(conductors):
        conductor.begin(world.transport(rank))
    for rank, conductor in enumerate(conductors):
        with pytest.raises(AgreementError, match="the ranks use different builds of hvd_gqsgd"):
            conductor.begin(world.transport(rank))
