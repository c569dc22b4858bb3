"""Steps of the pipeline: when they begin, how they are numbered, and what a dropped one leaves."""

from __future__ import annotations

import pytest
import torch
from simulated_ranks import Elastic, Group, check_unnamed, expected, gradients, same

from hvd_gqsgd.transports.simulated import SimulatedTransport, SimulatedWorld


@pytest.mark.parametrize("reached", ["submitted", "sent off", "summed", "waited for"])
def test_dropped_tickets(reached: str) -> None:
    """Wherever a step was given up by all ranks, the next one is as if nothing had happened."""
    tensors = gradients(3, [(None, 1500), (None, 10)])
    group = Group(3, bucket_mb=4096 / 2**20)
    tickets = group.submit(tensors)
    if reached == "sent off":
        for pipeline in group.ranks:
            pipeline.flush()
    elif reached != "submitted":
        group.settle()
        if reached == "waited for":
            for pipeline, own in zip(group.ranks, tickets, strict=True):
                pipeline.wait(own[0])
    del tickets
    if reached == "waited for":
        del pipeline, own
    check_unnamed(group.exchange(tensors), tensors, step=1)
    check_unnamed(group.exchange(tensors), tensors, step=2)


def test_one_ticket_of_many_dropped() -> None:
    """The others are still good, and the next step begins after them."""
    tensors = gradients(2, [(None, 100), (None, 200), (None, 300)])
    group = Group(2)
    tickets = group.submit(tensors)
    group.settle()
    for own in tickets:
        del own[1]
    for pipeline, own in zip(group.ranks, tickets, strict=True):
        for ticket, i in zip(own, (0, 2), strict=True):
            pipeline.wait(ticket)
            right = expected([mine[i][1] for mine in tensors], i)
            assert same(pipeline.decode(ticket, 0.5), right)
    del own, ticket
    check_unnamed(group.exchange(tensors), tensors, step=1)


def test_steps_begin_when_all_is_decoded() -> None:
    """Not while a ticket is out, even if it has been waited for."""
    tensors = gradients(2, [(None, 100)])
    group = Group(2)
    first = group.submit(tensors)
    group.settle()
    second = group.submit(tensors)
    group.settle()
    for pipeline, (one,), (two,) in zip(group.ranks, first, second, strict=True):
        for number, ticket in enumerate((one, two)):
            pipeline.wait(ticket)
            right = expected([own[0][1] for own in tensors], number, step=0)
            assert same(pipeline.decode(ticket, 0.5), right)
        assert pipeline.stats.steps == 1


@pytest.mark.parametrize("steps", [(0, 5, 3), (5, 0, 0), (0, 0, 2**30)])
def test_the_largest_step_counts(steps: tuple[int, ...]) -> None:
    """A rank that lost steps, or came later, falls in line."""
    tensors = gradients(3, [(None, 1500), (None, 1500)])
    group = Group(3, steps=steps, bucket_mb=4096 / 2**20)
    check_unnamed(group.exchange(tensors), tensors, step=max(steps))
    check_unnamed(group.exchange(tensors), tensors, step=max(steps) + 1)


def test_the_largest_step_is_remembered() -> None:
    """Even once the rank that brought it is gone."""
    group = Group(3, steps=(0, 0, 50), transport=Elastic)
    tensors = gradients(3, [(None, 100)])
    check_unnamed(group.exchange(tensors), tensors, step=50)
    left = Group(2)
    left.ranks = group.ranks[:2]
    for rank in range(2):
        group.transports[rank].end = left.transports[rank]
    check_unnamed(left.exchange(tensors[:2]), tensors[:2], step=51)


def test_the_world_changes_between_steps() -> None:
    """Ranks and levels are taken anew each step."""
    first = Group(3, transport=Elastic)
    for step, size in enumerate((3, 2, 1, 3)):
        world = SimulatedWorld(size)
        group = Group(size)
        group.ranks = first.ranks[:size]
        for rank in range(size):
            first.transports[rank].end = SimulatedTransport(world, rank)
        tensors = gradients(size, [(None, 1000)])
        check_unnamed(group.exchange(tensors), tensors, step=step)


def test_too_many_ranks() -> None:
    with pytest.raises(ValueError, match=r"bits=2 is too narrow for 2 ranks.* at least 3"):
        Group(2, bits=2, exchange="allreduce").ranks[0].submit(torch.ones(5))
