"""Memory that does not belong to the other ranks' any more, and gradients without elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import same_bits
from test_selections import ranks
from torch import Tensor

from hvd_gqsgd.simulation import SimulatedRanks

ESTIMATES: list[dict[str, Any]] = [
    {"keep": 1 / 4, "error_feedback": "ef21"},
    {"keep": 1 / 4, "error_feedback": "econtrol", "bits": 2, "rounding": "nearest"},
    {"keep": 1 / 4, "error_feedback": "marina"},
]


def step(world: SimulatedRanks, rows: dict[str, Tensor]) -> list[Tensor]:
    """The means of gradients, by name, of shape (ranks, elements)."""
    count = len(next(iter(rows.values())))
    of_ranks = [[(key, x[rank]) for key, x in rows.items()] for rank in range(count)]
    return [mean.clone() for mean in world.means(of_ranks)]


def random_rows(count: int, names: str) -> dict[str, Tensor]:
    return {name: torch.randn(count, 4096) for name in names}


def assert_one_mean(world: SimulatedRanks) -> None:
    """All ranks have the estimates of means that the last rank has."""
    *others, last = [state["memory"]["tensors"]["mean"] for state in world.state_dicts()]
    assert last
    assert all(same_bits(mean[key], last[key]) for mean in others for key in last)


@pytest.mark.parametrize("options", ESTIMATES, ids=str)
def test_a_gradient_that_comes_later_after_a_resize(options: dict[str, Any]) -> None:
    """Rank 0 has kept its estimates, and the other rank is new. The first step has one of two
    gradients alone."""
    world = ranks(3, **options)
    for _ in range(3):
        step(world, random_rows(3, "ab"))
    resized = ranks(2, **options)
    resized.load_state_dicts([world.state_dicts()[0], ranks(2, **options).state_dicts()[0]])
    for names in ("a", "ab", "ab"):
        step(resized, random_rows(2, names))
        assert_one_mean(resized)


def test_a_gradient_that_comes_later_after_another_exchange() -> None:
    """An Allreduce has no owners, and estimates without the owed amounts are wrong."""
    rows = random_rows(4, "ab")
    world = ranks(4, bits=4, error_feedback="ef21", exchange="two_phase")
    step(world, rows)
    other = ranks(4, error_feedback="ef21", exchange="allreduce")
    other.load_state_dicts(world.state_dicts())
    step(other, {"a": rows["a"]})
    for _ in range(30):
        mean = step(other, rows)[1]
    true = rows["b"].mean(0)
    assert float((mean - true).norm() / true.norm()) < 1e-5


def test_what_is_owed_is_dropped_with_its_estimates() -> None:
    """A state of estimates, loaded for residuals."""
    options: dict[str, Any] = {"bits": 4, "rounding": "nearest", "exchange": "two_phase"}
    world = ranks(2, error_feedback="ef21", **options)
    step(world, random_rows(2, "a"))
    other = ranks(2, error_feedback="residual", **options)
    other.load_state_dicts(world.state_dicts())
    for _ in range(5):
        (mean,) = step(other, {"a": torch.zeros(2, 4096)})
        assert not mean.any()


@pytest.mark.parametrize("options", [{"keep": 1 / 4}, *ESTIMATES], ids=str)
def test_a_gradient_without_elements(options: dict[str, Any]) -> None:
    """NaN in another gradient stays there, and is not lost."""
    world = ranks(2, min_numel=0, **options)
    for number in range(6):
        rows = random_rows(2, "ab") | {"c": torch.randn(2, 4096)}
        rows = {"a": rows["a"], "empty": torch.zeros(2, 0), "b": rows["b"], "c": rows["c"]}
        bad = number % 2 == 1
        if bad:
            rows["b"][0, 17] = torch.nan
        a, empty, b, c = step(world, rows)
        assert empty.numel() == 0
        assert bool(b.isnan().any()) == bad
        assert a.isfinite().all()
        assert c.isfinite().all()
