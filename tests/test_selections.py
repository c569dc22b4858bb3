"""A part of the elements: which are chosen, what the result is, and what becomes of the rest."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from helpers import chi_square_z, same_bits, threshold
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hvd_gqsgd import AgreementError, BlockBits, GlobalQSGD, simulate
from hvd_gqsgd.bench.wire import wire_bytes_of
from hvd_gqsgd.options import Options
from hvd_gqsgd.selections import Chosen, LeaderSelection, RandomSelection
from hvd_gqsgd.simulation import SimulatedRanks

CPU = torch.device("cpu")
MOST = threshold(1e-8)


def random_choice(numel: int, size: int, step: int = 0, identity: int = 0, seed: int = 0) -> Chosen:
    return RandomSelection(size, seed, 0, 2, False).choose([numel], [step], [identity], CPU)[0]


def places(chosen: Chosen, numel: int) -> Tensor:
    """The numbers of the elements that are kept."""
    unit = chosen.groups.unit
    elements = chosen.units[:, None] * unit + torch.arange(unit)
    return elements[elements < numel]


@given(
    numel=st.integers(0, 5000), size=st.integers(1, 70), step=st.integers(0, 2**31 - 1),
    half=st.booleans(),
)  # fmt: skip
def test_one_run_of_each_group(numel: int, size: int, step: int, half: bool) -> None:
    chosen = random_choice(numel, size, step)
    assert chosen.units.tolist() == sorted(chosen.units.tolist())
    assert (chosen.units // size).tolist() == list(range(math.ceil(numel / 32 / size)))
    x = torch.randn(numel).to(torch.float16 if half else torch.float32)
    small, result = x.new_empty(chosen.groups.kept), torch.full_like(x, math.nan)
    chosen.take(x, small)
    chosen.spread(small, result)
    expected = torch.zeros_like(x)
    kept = places(chosen, numel)
    expected[kept] = x[kept]
    assert same_bits(result, expected)
    assert not small.isnan().any()
    assert small.count_nonzero() == x[kept].count_nonzero()


def unevenness(units: Tensor, size: int) -> float:
    """The statistic of the places of units in their groups; normal for even ones."""
    return chi_square_z(torch.bincount(units % size, minlength=size).numpy())


def test_every_run_of_a_group_is_as_likely() -> None:
    """Over the groups of a tensor, over tensors, and over steps, with a false alarm in 1e8; half of
    one run of 64 left out is told."""
    many = 64 * 32 * 2**16
    assert unevenness(random_choice(many, 64).units, 64) < MOST
    one = 64 * 32
    over_steps = torch.cat([random_choice(one, 64, step=i).units for i in range(6400)])
    over_tensors = torch.cat([random_choice(one, 64, identity=i).units for i in range(6400)])
    assert unevenness(over_steps, 64) < MOST
    assert unevenness(over_tensors, 64) < MOST
    units = random_choice(many, 64).units
    biased = torch.where((units % 64 == 63) & (torch.arange(len(units)) % 2 == 0), units - 1, units)
    assert unevenness(biased, 64) > MOST


OPTIONS: list[dict[str, Any]] = [
    {}, {"exchange": "two_phase", "bits": 4}, {"bits": BlockBits(4)}, {"dither": "exponential"},
    {"norm": "l2"}, {"block_size": None}, {"bits": 3, "correlated": False, "seed": 7},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("numel", [20_000, 64 * 32])
def test_one_run_of_each_group_is_exchanged(options: dict[str, Any], numel: int) -> None:
    """Times the number of runs in its group, with the error of an exchange of these elements."""
    rows = torch.randn(3, numel)
    result = simulate(rows, step=5, keep=1 / 16, **options)
    runs = torch.nn.functional.pad(result, (0, -numel % 32)).view(-1, 32).any(1).nonzero()[:, 0]
    assert (runs // 16).tolist() == list(range(math.ceil(numel / 32 / 16)))
    kept = (runs[:, None] * 32 + torch.arange(32)).flatten()
    kept = kept[kept < numel]
    assert not result.index_fill(0, kept, 0).any()
    last = math.ceil(numel / 32) - (len(runs) - 1) * 16
    factors = torch.where(kept // 32 == runs[-1], float(last), 16.0)
    exact = rows.mean(0)[kept]
    error = (result[kept] / factors - exact).norm() / exact.norm()
    plain = (simulate(rows[:, kept].contiguous(), step=5, **options) - exact).norm() / exact.norm()
    if len(kept) > 100:
        assert 0.5 * plain < error < 2 * plain


def test_the_choice_is_unbiased_and_has_the_error_of_theory() -> None:
    """E|C(x) - x|^2 = (m - 1) |x|^2, and the mean of ten random sums of the elements, each with a
    false alarm in 1e8; a factor that is off by a seventh is told."""
    x = torch.randn(40 * 32 * 8)
    results = torch.stack([
        simulate(torch.stack([x, x]), step=step, keep=1 / 8, bits=16) for step in range(800)
    ]).double()  # fmt: skip
    errors = (results - x).square().sum(1) / x.double().square().sum()
    assert abs(errors.mean() - 7) < MOST * errors.std() / math.sqrt(800)
    sums = (results - x) @ torch.randn(len(x), 10, dtype=torch.float64)
    off = sums.mean(0).abs() / (sums.std(0) / math.sqrt(800))
    assert (off < MOST).all()
    wrong = ((results * 8 / 7 - x) @ x.double()).mean() / (
        ((results - x) @ x.double()).std() / math.sqrt(800)
    )
    assert wrong > MOST


@pytest.mark.parametrize("select", ["random", "leader"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_told_wherever_it_is(select: Any, bad: float) -> None:
    x = torch.randn(2, 10_000)
    kept = simulate(x, keep=1 / 8)
    x[1, int((kept == 0).nonzero()[0])] = bad  # not chosen
    (mean,) = ranks(2, keep=1 / 8, select=select).means([[("", row)] for row in x])
    assert mean.isnan().sum() >= 1250


def ranks(size: int, **options: Any) -> SimulatedRanks:
    return SimulatedRanks(size, Options(**options))


def steps(world: SimulatedRanks, gradients: Tensor) -> Tensor:
    """The means of all steps."""
    return torch.stack([
        world.means([[("x", row.contiguous())] for row in rows])[0].clone() for rows in gradients
    ])  # fmt: skip


def test_the_leader_takes_its_largest_elements() -> None:
    rows = torch.randn(2, 3, 1001)  # of 2 steps and 3 ranks
    means = steps(ranks(3, keep=1 / 10, select="leader", bits=16), rows)
    first = rows[0, 0]  # rank 0 leads in step 0
    blocks = torch.nn.functional.pad(first.abs(), (0, 9)).view(-1, 10)
    chosen = blocks.argmax(1) + 10 * torch.arange(101)
    assert {*means[0].nonzero().flatten().tolist()} <= {*chosen.tolist()}  # one may round to 0
    assert torch.allclose(means[0][chosen], rows[0].mean(0)[chosen], atol=1e-3)
    left = rows[0].clone()
    left[:, chosen] = 0
    second = (left + rows[1])[1]  # rank 1 leads in step 1, with its residual
    blocks = torch.nn.functional.pad(second.abs(), (0, 9)).view(-1, 10)
    again = blocks.argmax(1) + 10 * torch.arange(101)
    assert {*means[1].nonzero().flatten().tolist()} <= {*again.tolist()}
    assert torch.allclose(means[1][again], (left + rows[1]).mean(0)[again], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_is_lost_by_a_leader(dtype: torch.dtype) -> None:
    """After some steps without a gradient, all of the gradients were sent."""
    rows = torch.randn(1, 4, 2000).to(dtype)
    quiet = torch.zeros(60, 4, 2000, dtype=dtype)
    means = steps(ranks(4, keep=1 / 8, select="leader", bits=16), torch.cat([rows, quiet]))
    exact = rows[0].double().mean(0)
    error = (means.double().sum(0) - exact).norm() / exact.norm()
    assert error < (0.01 if dtype == torch.bfloat16 else 0.002)
    assert (means[0].double() - exact).norm() > 0.5 * exact.norm()  # not in the first step


def test_the_low_pass_filter_of_scalecom() -> None:
    """r' = (1 - beta) r + beta (r + g - sent), by a model of one rank in float64."""
    rows = torch.randn(6, 2, 640)
    rows[:, 1] = 0  # rank 0's part alone
    means = steps(ranks(2, keep=1 / 4, select="leader", low_pass=0.25, bits=16), rows)
    residual = torch.zeros(640, dtype=torch.float64)
    for step, row in enumerate(rows[:, 0].double()):
        total = residual + row
        sent = means[step].double() * 2
        chosen = means[step] != 0
        if step % 2 == 0:  # rank 1, with zeros, chooses the first of each group
            assert torch.allclose(sent[chosen], total[chosen], atol=1e-2)
        unsent = torch.where(chosen if step % 2 == 0 else first_of_each(4, 640), 0, total)
        residual = 0.75 * residual + 0.25 * unsent
    assert residual.norm() > 0


def first_of_each(size: int, numel: int) -> Tensor:
    return torch.arange(numel) % size == 0


def test_a_skipped_step_leaves_the_residual() -> None:
    """A GradScaler drops a step with infinity; what was not sent before is sent after."""
    world, twin = (ranks(2, keep=1 / 8, select="leader") for _ in range(2))
    rows = torch.randn(3, 2, 4096)
    broken = torch.randn(2, 4096)
    broken[1, 17] = math.inf
    first = steps(world, rows[:1])
    assert steps(world, broken[None]).isnan().any()
    after = steps(world, rows[1:])
    assert same_bits(first, steps(twin, rows[:1]))
    assert after.isfinite().all()
    steps(twin, torch.full((1, 2, 4096), math.nan))
    assert same_bits(after, steps(twin, rows[1:]))


@pytest.mark.parametrize(
    "place", [16, 255], ids=["behind its group", "far"]
)  # fmt: skip
def test_an_invalid_choice_is_an_error(place: int) -> None:
    selection = LeaderSelection(10, 0, 0, 2, True)
    message = torch.zeros(selection.words([95]), dtype=torch.int32)
    assert len(selection.read(message, [95])) == 1
    message.view(torch.uint8)[3] = place
    with pytest.raises(AgreementError, match=f"to {place} in groups of 10"):
        selection.read(message, [95])
    message.zero_().view(torch.uint8)[9] = 7  # the last group has 5 elements
    with pytest.raises(AgreementError, match="invalid message"):
        selection.read(message, [95])


def test_the_leader_leaves_less_than_it_had() -> None:
    """|a - C(a)|^2 <= (1 - 1/m) |a|^2 on the leader, with equality where a group is even."""
    selection = LeaderSelection(8, 0, 0, 2, True)
    for x in (torch.randn(4096), torch.ones(4096)):
        message = torch.zeros(selection.words([4096]), dtype=torch.int32)
        selection.write([x], message)
        (chosen,) = selection.read(message, [4096])
        left = chosen.left(x.clone()).square().sum() / x.square().sum()
        assert left <= 1 - 1 / 8
    assert left == 1 - 1 / 8


def test_large_groups() -> None:
    """Places of 16 bits."""
    rows = torch.randn(1, 2, 3 * 40_000)
    means = steps(ranks(2, keep=1 / 40_000, select="leader"), rows)
    expected = rows[0, 0].abs().view(3, -1).argmax(1) + 40_000 * torch.arange(3)
    assert means[0].nonzero().flatten().tolist() == expected.tolist()


def descend(steps: int, **options: Any) -> tuple[float, float]:
    """Distances from the minimum of a quadratic function, of the last point and of the mean of the
    last half; each of 4 ranks has a function of its own."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(4, 4096, generator=generator)
    minimum, x = targets.mean(0), torch.zeros(4096)
    world, tail = ranks(4, **options), torch.zeros(4096)
    for step in range(steps):
        (mean,) = world.means([[("x", (x - target).contiguous())] for target in targets])
        x = x - 0.02 * mean
        if step >= steps // 2:
            tail += x / (steps - steps // 2)
    return float((x - minimum).norm()), float((tail - minimum).norm())


def test_descent_on_a_quadratic_function() -> None:
    """A leader with residuals comes to the minimum of the sum, though each rank's own is elsewhere;
    without residuals it stays away. Random runs come as near on average."""
    begin = float(torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).mean(0).norm())
    last, _ = descend(600, keep=1 / 16, select="leader")
    assert last < 0.1 * begin
    without, _ = descend(600, keep=1 / 16, select="leader", low_pass=0.001)
    assert without > 0.3 * begin
    _, mean = descend(600, keep=1 / 16)
    assert mean < 0.1 * begin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be 1 divided by an int"),
        ({"keep": 0.3}, "keep must be 1 divided by an int"),
        ({"keep": 2}, "keep must be 1 divided by an int"),
        ({"keep": math.nan}, "keep must be 1 divided by an int"),
        ({"keep": 1e-9}, "from 1 to 65536"),
        ({"keep": 1e-320}, "from 1 to 65536"),
        ({"select": "leader"}, "select='leader' has no effect with keep=1, which"),
        ({"keep": 64}, "got 64: did you mean keep=1/64\\?"),
        ({"keep": 1 / 8, "select": "best"}, "select must be one of"),
        ({"keep": 1 / 8, "low_pass": 0.5}, "has no effect with error_feedback=None"),
        ({"keep": 1 / 8, "select": "leader", "low_pass": 0}, "above 0 and at most 1"),
        ({"keep": 1 / 8, "bits": "auto"}, "does not go with bits='auto'"),
        ({"keep": 1 / 8, "hierarchy": "node"}, "hierarchy='node' does not go with keep"),
        ({"keep": 1 / 8, "select": "leader", "exchange": "one_phase"}, "does not go with"),
    ],
    ids=str,
)
def test_options_that_are_not_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_a_leader_needs_names_of_parameters() -> None:
    with pytest.raises(ValueError, match=r"simulate\(\) takes no error feedback"):
        simulate(torch.randn(2, 100), keep=1 / 8, select="leader")
    with pytest.raises(ValueError, match=r"pass GlobalQSGD\(named_parameters"):
        GlobalQSGD(keep=1 / 8, select="leader")


def test_text_and_equality() -> None:
    assert Options(keep=1 / 3) == Options(keep=0.33333333333333)
    assert "keep" not in repr(GlobalQSGD())
    named = torch.nn.Linear(2, 2).named_parameters()
    compressor = GlobalQSGD(keep=1 / 8, select="leader", named_parameters=named)
    assert "keep=0.125, select='leader'" in repr(compressor)
    assert (
        Options(keep=1 / 8, select="leader").digest()
        == Options(keep=1 / 8, select="leader", error_feedback="residual").digest()
    )
    assert Options(keep=np.float32(1 / 64)) == Options(keep=Fraction(1, 64))


def test_residuals_go_with_a_checkpoint(caplog: pytest.LogCaptureFixture) -> None:
    """Those of a rank continue there; another rank drops them, and says so."""
    from hvd_gqsgd.engine.steps import Steps

    first = Steps(8, feedback="residual")
    first.memory.begin(1, 2)
    first.memory.set("residual", 5, torch.arange(4.0))
    state = first.state_dict()
    for rank, expected in ((1, [0.0, 1, 2, 3]), (0, [0.0] * 4)):
        resumed = Steps(8, feedback="residual")
        resumed.load_state_dict(state)
        with caplog.at_level(logging.WARNING, "hvd_gqsgd"):
            resumed.memory.begin(rank, 2)
        assert resumed.memory.zeros("residual", 5, torch.ones(4)).tolist() == expected
    assert (
        "rank 0 drops the residuals and estimates that it has loaded, as they are those of rank 1"
        in (caplog.text)
    )
    assert "memory" not in Steps(8).state_dict()
    memory = state["memory"]
    for broken in (
        {"rank": 0}, [], memory | {"tensors": {"a": 1}}, memory | {"turns": {1: "x"}},
        memory | {"tensors": {"own": {1: 2}}},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="memory must"):
            Steps(8).load_state_dict(state | {"memory": broken})


@pytest.mark.parametrize("select", ["random", "permutation", "leader"])
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": BlockBits(4)}], ids=str)
def test_bytes_on_the_wire(options: dict[str, Any], select: Any) -> None:
    """As in THEORY.md."""
    options = options | {"keep": 1 / 64, "select": select}
    world = ranks(4, **options)
    numels = [64 * 4096, 10_007, 33]
    world.means([[(str(n), torch.randn(n)) for n in numels] for _ in range(4)])
    bytes_ = wire_bytes_of(Options(**options), numels, 4)
    assert world.stats.compressed_bytes_on_wire == bytes_
    assert world.stats.ratio > {"leader": 64, "permutation": 120, "random": 200}[select] * 0.9
