"""A permutation: each rank sends other runs, and all ranks gather them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_selections import MOST, OPTIONS, random_choice, ranks, steps

from hvd_gqsgd import simulate
from hvd_gqsgd.options import Options
from hvd_gqsgd.selections import Chosen, RandomSelection

CPU = torch.device("cpu")


def own_choice(numel: int, size: int, rank: int, step: int = 0) -> Chosen:
    selection = RandomSelection(size, 0, 0, 2, False)
    return selection.choose([numel], [step], [0], CPU, rank)[0]


@pytest.mark.parametrize(("size", "several"), [(4, 4), (8, 3), (2, 5)])
def test_ranks_of_a_permutation_have_other_runs(size: int, several: int) -> None:
    """As far as there are others; the choice of rank 0 is that of all ranks at random."""
    numel = 32 * size * 9
    units = torch.stack([own_choice(numel, size, rank).units for rank in range(several)])
    assert all(len(group.unique()) == min(size, several) for group in units.T)
    assert torch.equal(units[0], random_choice(numel, size).units)
    assert (units.T // size == torch.arange(9)[:, None]).all()


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[2:], ids=str)
@pytest.mark.parametrize("numel", [20_000, 4 * 32])
def test_a_permutation_takes_each_element_from_one_rank(
    options: dict[str, Any], numel: int
) -> None:
    """With 1/4 on 4 ranks: the gradient of that rank, rounded once on the norm of all."""
    rows = torch.randn(4, numel)
    result = simulate(rows, step=3, keep=1 / 4, select="permutation", **options)
    runs = math.ceil(numel / 32)
    each = torch.nn.functional.pad(rows, (0, -numel % 32)).view(4, runs, 32)
    got = torch.nn.functional.pad(result, (0, -numel % 32)).view(runs, 32)
    whole = runs // 4 * 4  # the last group may have fewer runs, of several ranks
    errors = (each - got).norm(dim=2)[:, :whole]
    owner = errors.argmin(0)
    assert (owner.view(-1, 4).sort(1).values == torch.arange(4)).all()
    error = errors.min(0).values.norm() / each[:, :whole].norm() * 2
    plain = simulate(rows[:1].expand(2, -1), **options | {"exchange": "two_phase"})
    rounding = (plain - rows[0]).norm() / rows[0].norm()
    assert error < 3 * rounding


def test_a_permutation_is_exact_where_ranks_are_the_same() -> None:
    """Its variance is that of the ranks: 0 for PermK; 1 of 8 on 2 ranks leaves (8 / 2 - 1) |x|^2,
    and that of 1 of 8 at random is 7 |x|^2; false alarms in 1e8."""
    x = torch.randn(4 * 32 * 64)
    rows = torch.stack([x] * 4)
    result = simulate(rows, keep=1 / 4, select="permutation", bits=16)
    assert (result - x).norm() < 1e-3 * x.norm()
    few = torch.stack([x] * 2)
    errors = torch.stack([
        (simulate(few, step=i, keep=1 / 8, select="permutation", bits=16) - x).square().sum()
        / x.square().sum() for i in range(400)
    ])  # fmt: skip
    assert abs(errors.mean() - 3) < MOST * errors.std() / 20
    assert abs(errors.mean() - 7) > MOST * errors.std() / 20


def test_a_permutation_is_unbiased() -> None:
    """The mean of ten random sums, with a false alarm in 1e8 each; with fewer ranks than 1 / keep,
    and with more."""
    for rows, keep in ((torch.randn(3, 32 * 8 * 4), 1 / 8), (torch.randn(5, 32 * 8 * 4), 1 / 2)):
        results = torch.stack([
            simulate(rows, step=i, keep=keep, select="permutation", bits=8) for i in range(800)
        ]).double()  # fmt: skip
        directions = torch.randn(rows.shape[1], 10, dtype=torch.float64)
        sums = (results - rows.double().mean(0)) @ directions
        off = sums.mean(0).abs() / (sums.std(0) / math.sqrt(800))
        assert (off < MOST).all()


def test_a_permutation_with_residuals_loses_nothing() -> None:
    rows = torch.randn(1, 4, 2009)
    world = ranks(4, keep=1 / 8, select="permutation", error_feedback="residual", bits=16)
    means = steps(world, torch.cat([rows, torch.zeros(7, 4, 2009)]))
    exact = rows[0].double().mean(0)
    assert (means.double().sum(0) - exact).norm() < 0.002 * exact.norm()


@pytest.mark.parametrize("other", [{"exchange": "two_phase"}, {"error_feedback": "ef21"}], ids=str)
def test_options_that_are_not_possible(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is an Allgather: "):
        Options(keep=1 / 8, select="permutation", **other)
