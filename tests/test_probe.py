"""The probe's verdicts, computed as Horovod computes them, for many worlds and mistakes."""

from __future__ import annotations

import itertools

import pytest
import torch

# The real thing, without a job: only the arithmetic of the reduction is done here.
from hvd_gqsgd.exchanges.contribution import Contribution, everyone, rank_weight
from hvd_gqsgd.frontends.horovod_probe import Reading, make_probe


def reduce_(ranks, identities=None, prescale=1.0, postscale=1.0, average_over=None):
    """What Horovod makes of the probes of some ranks with op=Sum, or with op=Average."""
    identities = identities or {}
    probes = [make_probe(rank, identities.get(rank, 0x5A5A5A)) * prescale for rank in ranks]
    scale = postscale / average_over if average_over else postscale
    return Reading.of(torch.stack(probes).sum(0) * scale)


MANY = pytest.param(10_000, marks=pytest.mark.slow)


def contribution(ranks):
    return Contribution(len(ranks), sum(ranks), sum(map(rank_weight, ranks)), len(ranks))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 16, 127, 1000, MANY])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1 / 3, 3.0), (1e-30, 1.0), (1.0, -2.0)])
def test_the_right_reduction_is_recognized(size, scales):
    for average_over in (None, size):
        reading = reduce_(range(size), None, *scales, average_over)
        assert reading.matches(everyone(size))
        assert reading.same_tensor()
        expected = scales[0] * scales[1] * (1 / average_over if average_over else 1)
        assert reading.scale(size, size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 10, 12])
def test_no_other_ranks_are_mistaken_for_all(size):
    for count in range(1, size):
        for ranks in itertools.combinations(range(size), count):
            assert not reduce_(ranks).matches(everyone(size)), ranks
            assert not reduce_(ranks, average_over=count).matches(everyone(size)), ranks
            assert reduce_(ranks, average_over=size).matches(contribution(ranks)), ranks


@pytest.mark.parametrize("size", [16, 32, 64, 128, 1024])
def test_halves_are_not_mistaken_for_all(size):
    halves = [range(size // 4, 3 * size // 4), range(0, size, 2), range(size // 2)]
    for ranks in halves:
        assert not reduce_(list(ranks)).matches(everyone(size))


@pytest.mark.parametrize("size", [2, 3, 4, 8, 127])
def test_other_reductions_are_recognized(size):
    probes = torch.stack([make_probe(rank, 123) for rank in range(size)])
    for result in (probes.amin(0), probes.amax(0), probes.prod(0)):
        assert not Reading.of(result).matches(everyone(size))
    if size == 2:  # Adasum of two: each minus half of its projection on the other
        a, b = probes
        result = (1 - a @ b / (2 * (a @ a))) * a + (1 - a @ b / (2 * (b @ b))) * b
        assert not Reading.of(result).matches(everyone(size))


@pytest.mark.parametrize("size", [2, 3, 4, 8, 127, 1000, MANY])
@pytest.mark.parametrize("one", [1, 0x7FF, 0xFFF, 0x1000, 0xFFFFFF])
def test_one_rank_with_another_tensor_is_noticed(size, one):
    for others in (0, one ^ 1, 0xABCDEF):
        identities = dict.fromkeys(range(size), others) | {size - 1: one}
        for average_over in (None, size):
            assert not reduce_(range(size), identities, 1.0, 1.0, average_over).same_tensor()


def test_three_that_average_out_are_noticed():
    assert not reduce_(range(3), {0: 1, 1: 2, 2: 3}).same_tensor()


def test_nothing_is_right_about_nan():
    reading = Reading.of(torch.full((7,), float("nan"), dtype=torch.float64))
    assert not reading.matches(everyone(4))
    assert not reading.same_tensor()
