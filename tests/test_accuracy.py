"""The expected errors of the performance model, against those of real exchanges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hvd_gqsgd import BlockBits, simulate
from hvd_gqsgd.tools.accuracy import relative_error, relative_variance, squared_error
from hvd_gqsgd.tools.settings import (
    BLOCKS_4,
    EXPONENTIAL_8,
    FP16,
    FP32,
    LINEAR_4,
    LINEAR_8,
    SETTINGS,
    TWO_PHASE_8,
    Setting,
    kept,
    levels,
    possible,
)

OPTIONS: dict[Setting, dict[str, Any]] = {
    LINEAR_8: {"bits": 8, "exchange": "allreduce"},
    TWO_PHASE_8: {"bits": 8, "exchange": "two_phase"},
    LINEAR_4: {"bits": 4, "exchange": "two_phase"},
    EXPONENTIAL_8: {"bits": 8, "dither": "exponential"},
}
ranks_ = pytest.mark.parametrize("ranks", [2, 4, 16])


def normal(ranks: int) -> Tensor:
    return torch.randn(ranks, 2**18, generator=torch.Generator().manual_seed(ranks))


def error_of(mean: Tensor, rows: Tensor) -> float:
    true = rows.double().mean(0)
    return float((mean.double() - true).norm() / true.norm())


@ranks_
@pytest.mark.parametrize("setting", OPTIONS, ids=lambda setting: setting.name)
def test_expected_errors_are_those_of_normal_gradients(setting: Setting, ranks: int) -> None:
    rows = normal(ranks)
    found = error_of(simulate(rows, **OPTIONS[setting]), rows)
    assert found == pytest.approx(relative_error(setting, ranks), rel=0.05)


@ranks_
@pytest.mark.parametrize("setting", [TWO_PHASE_8, LINEAR_4, EXPONENTIAL_8], ids=lambda s: s.name)
def test_means_that_are_rounded_once(setting: Setting, ranks: int) -> None:
    rows = normal(ranks)
    found = error_of(simulate(rows, **OPTIONS[setting] | {"exchange": "one_phase"}), rows)
    assert found == pytest.approx(relative_error(setting, ranks, one_phase=True), rel=0.05)


@ranks_
def test_parts_of_the_elements(ranks: int) -> None:
    """At random, and in a permutation, whose ranks are as different here as they can be."""
    rows = normal(ranks)
    for setting in kept(1 / 16, ranks)[:2]:
        options: dict[str, Any] = {"select": "permutation"} if setting.disjoint else {}
        found = [
            error_of(simulate(rows, step=i, keep=1 / 16, **options), rows) ** 2 for i in range(20)
        ]
        assert sum(found) / 20 == pytest.approx(squared_error(setting, ranks), rel=0.05)


@ranks_
def test_half_precision(ranks: int) -> None:
    """Each gradient and each partial sum is rounded, as in a ring."""
    rows = normal(ranks)
    total = rows[0].half()
    for row in rows[1:]:
        total = total + row.half()
    found = error_of(total.float() / ranks, rows)
    assert found == pytest.approx(relative_error(FP16, ranks), rel=0.15)
    assert relative_error(FP32, ranks) < 1e-6


def test_a_width_per_block_gains_where_scales_differ() -> None:
    """By more than smaller blocks gain with one scale, and the model has the measured gain."""
    rows = normal(8)
    scales = (10.0 ** torch.arange(-3, 1)).repeat_interleave(256).repeat(rows.shape[1] // 1024)
    one_scale, differing = (
        error_of(simulate(x, bits=BlockBits(4)), x) for x in (rows, rows * scales)
    )
    assert one_scale < 0.95 * relative_error(LINEAR_4, 8)
    assert differing < one_scale / 3
    assert squared_error(BLOCKS_4, 8) == squared_error(LINEAR_4, 8) / BLOCKS_4.gain


@ranks_
@pytest.mark.parametrize("setting", OPTIONS, ids=lambda setting: setting.name)
def test_bounds(setting: Setting, ranks: int) -> None:
    """A quarter of the relative variance bounds the error, as blocks with the norm 1 have it."""
    rows = normal(ranks)
    mean, true = simulate(rows, **OPTIONS[setting]).double(), rows.double().mean(0)
    squares = (mean - true).square().view(-1, 1024).mean(1)
    norms = rows.double().abs().view(ranks, -1, 1024).amax((0, 2))
    assert (squares / norms.square()).max() < relative_variance(setting, ranks) / 4


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_levels_and_limits(setting: Setting) -> None:
    assert relative_error(setting, 1) == 0
    side = levels(setting, 4)
    if not setting.quantized:
        assert side is None
        return
    assert side == {8: 31 if not setting.two_phase else 127, 4: 7}[int(setting.bits)]
    assert possible(setting, 1000) == setting.two_phase
    errors = [relative_error(setting, ranks) for ranks in (200, 1000)]
    assert errors == [math.inf] * 2 if not setting.two_phase else max(errors) < 1
