"""The schedule of the bit width: it keeps the budget, and follows the norm; and its options."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from typing import Any

import numpy as np
import pytest
from schedules import RUNS, costs, drive, falling, jumping, jumping_noisily, noisy

from hvd_gqsgd import layout
from hvd_gqsgd.codecs.bit_schedule import WIDTHS, DynamicBits, Schedule, wire_bits

WORD_MAX = 2**31 - 1
BUDGETS = [3, 5, 6.5, 8]
TOLERANCE = 0.03  # of the budget


def feasible(budget: float, ranks: int) -> bool:
    """Whether the narrowest lane for so many ranks is within the budget, but for the tolerance."""
    return wire_bits((2 * ranks).bit_length()) <= budget * (1 + TOLERANCE / 2 + 0.001)


WORLDS = [pair for pair in itertools.product(BUDGETS, [1, 2, 4]) if feasible(*pair)]


def test_worlds() -> None:
    """All but 3 bits for 4 ranks, which need 4."""
    assert len(WORLDS) == 11 and (3, 4) not in WORLDS


@pytest.mark.parametrize("bits", range(2, 17))
def test_wire_bits(bits: int) -> None:
    """What ``ops`` allocates, but for padding: less than a word in 1024 elements."""
    numel = 1024 * 7
    word = layout.word_dtype(bits).itemsize
    actual = layout.words_for(numel, 1024, bits) * word * 8 / numel
    assert 0 <= actual - wire_bits(bits) < word * 8 / 1024


def test_widths() -> None:
    """The widest for each cost, and each costs more than the one before."""
    widest = {wire_bits(bits): bits for bits in range(2, 17)}
    assert tuple(widest.values()) == WIDTHS == (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16)
    assert list(widest) == sorted(widest)


@pytest.mark.parametrize(("budget", "ranks"), WORLDS)
@pytest.mark.parametrize("run", RUNS)
def test_budget_of_a_run_of_known_length(run: str, budget: float, ranks: int) -> None:
    """Is spent within 3 %, whatever the norms do."""
    for total in (200, 1000):
        schedule = Schedule(DynamicBits(budget=budget, total_steps=total))
        spent = costs(drive(schedule, RUNS[run](total), ranks))
        assert spent.mean() == pytest.approx(budget, rel=TOLERANCE)


@pytest.mark.parametrize(("budget", "ranks"), WORLDS)
@pytest.mark.parametrize("run", RUNS)
def test_budget_of_a_run_of_unknown_length(run: str, budget: float, ranks: int) -> None:
    """The same from some hundred steps on, and half a run does not starve the other half."""
    spent = costs(drive(Schedule(DynamicBits(budget=budget)), RUNS[run](600), ranks))
    assert spent.mean() == pytest.approx(budget, rel=TOLERANCE)
    assert spent[:300].mean() == pytest.approx(budget, rel=2 * TOLERANCE)


@pytest.mark.parametrize("run", ["falling 1000x", "1/t", "jumping noisily"])
def test_budget_of_a_long_run_and_of_the_convex_form(run: str) -> None:
    """Nor does a weight of a^((T-t)/2) change what is spent, even where it is all there is."""
    for contraction in (1, 0.999, 0.9):
        dynamic = DynamicBits(total_steps=2000, form="convex", contraction=contraction)
        spent = costs(drive(Schedule(dynamic), RUNS[run](2000)))
        assert spent.mean() == pytest.approx(5, rel=TOLERANCE)


def test_budget_past_the_end() -> None:
    """A run that goes on keeps to it."""
    schedule = Schedule(DynamicBits(budget=5, total_steps=100))
    spent = costs(drive(schedule, noisy(700)))
    assert spent[:100].mean() == pytest.approx(5, rel=TOLERANCE)
    assert spent[100:].mean() == pytest.approx(5, rel=TOLERANCE)


def test_an_unpayable_debt_is_forgotten() -> None:
    """64 ranks cannot keep to 4 bits; the 2 that are left after a while can."""
    schedule = Schedule(DynamicBits(budget=4))
    assert set(drive(schedule, [0.0] * 5000, ranks=64)) == {8}
    drive(schedule, [0.0] * 500, ranks=1)
    assert costs(drive(schedule, [0.0] * 500)).mean() == pytest.approx(4, rel=TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("budget", [5, 6.5, 8])
@pytest.mark.parametrize("total", [600, 2000])
def test_widths_follow_falling_norms(total: int, budget: float, ranks: int) -> None:
    """More bits early, fewer late, by far more than one; a constant width has none of it."""
    norms = falling(100)(total)
    schedule = Schedule(DynamicBits(budget=budget, total_steps=total))
    spent = costs(drive(schedule, norms, ranks))
    assert spent[: total // 3].mean() > spent[-total // 3 :].mean() + 1
    assert np.corrcoef(spent, norms)[0, 1] > 0.6


def test_a_rise_is_not_saved_for() -> None:
    """As when training sets in: small norms for a while, then large ones, which slowly fall."""
    norms = [-2.0] * 40 + [2 - 3 * t / 560 for t in range(560)]
    spent = costs(drive(Schedule(DynamicBits(total_steps=600)), norms))
    assert spent[41:141].mean() > max(spent[:40].mean(), spent[-100:].mean()) + 1


@pytest.mark.parametrize("power", [1, 0.5, 0])
def test_twice_the_norm_is_a_bit_more(power: float) -> None:
    """s = k |g|^p: norms of 2 and 1/2 in turn give widths 2 p bits apart."""
    norms = [(-1.0) ** t for t in range(1000)]
    spent = costs(drive(Schedule(DynamicBits(budget=8, power=power)), norms))[200:]
    after_high, after_low = spent[1::2], spent[0::2]  # even steps are high
    assert after_high.mean() - after_low.mean() == pytest.approx(2 * power, abs=0.1)


def test_a_larger_norm_is_one_for_some_dozens_of_steps() -> None:
    """Without an end to plan for, it then becomes what is usual."""
    spent = costs(drive(Schedule(DynamicBits(budget=8)), [0.0] * 100 + [2.0] * 300))
    assert set(spent[:101]) == {8}
    assert spent[109:125].mean() > 8.4
    assert spent[-100:].mean() == pytest.approx(8, abs=0.1)


def test_convex_weight() -> None:
    """s = k a^((T-t)/2) |g|: at a constant norm, -log2(a)/2 bits more with each step."""
    total, contraction = 2000, 0.998
    dynamic = DynamicBits(budget=8, total_steps=total, form="convex", contraction=contraction)
    spent = costs(drive(Schedule(dynamic), [0.0] * total))
    slope = np.polyfit(np.arange(total), spent, 1)[0]
    assert slope == pytest.approx(-math.log2(contraction) / 2, rel=0.1)
    flat = dataclasses.replace(dynamic, contraction=1)
    assert set(drive(Schedule(flat), [0.0] * total)) == {8}


@pytest.mark.parametrize("run", ["falling 100x", "1/t", "noisy"])
def test_convex_spends_later_than_nonconvex(run: str) -> None:
    """Whatever the norms do."""
    norms = RUNS[run](600)
    nonconvex = costs(drive(Schedule(DynamicBits(total_steps=600)), norms))
    dynamic = DynamicBits(total_steps=600, form="convex", contraction=0.995)
    convex = costs(drive(Schedule(dynamic), norms))
    late = slice(400, None)
    assert convex[late].mean() > nonconvex[late].mean() + 0.3
    assert convex[:200].mean() < nonconvex[:200].mean() - 0.3


def test_another_loss_scale_is_not_followed() -> None:
    """Times 2^16 and back: the gradients have not become more precious."""
    for total in (None, 600):
        dynamic = DynamicBits(total_steps=total)
        assert drive(Schedule(dynamic), jumping(0.5, 0.9)(600)) == drive(
            Schedule(dynamic), [0.0] * 600
        )
        plain = costs(drive(Schedule(dynamic), noisy(600)))
        scaled = costs(drive(Schedule(dynamic), jumping_noisily(600)))
        # The change of scale is known but for the noise of the step in which it came.
        assert abs(plain - scaled).mean() < 0.15 < plain.std() / 5


def test_only_usable_widths() -> None:
    """Within the options, wide enough for a level, and one that the wire has."""
    rng = random.Random(0)
    for low, high in [(2, 16), (5, 9), (4, 4), (7, 11), (2, 12)]:
        usable = [w for w in WIDTHS if low <= w <= high]
        for ranks in (1, 2, 3, 7, 8, 127):
            legal = [w for w in usable if (2**w - 1) // (2 * ranks) >= 1]
            if not legal:
                continue
            schedule = Schedule(DynamicBits(budget=low, min_bits=low, max_bits=high))
            norms = [rng.gauss(0, 10) for _ in range(200)]
            assert set(drive(schedule, norms, ranks)) <= set(legal)


def test_first_width_is_the_budget() -> None:
    """There is no norm yet to go by."""
    for budget, total in itertools.product([2, 4, 8, 16], [None, 1, 1000]):
        assert Schedule(DynamicBits(budget=budget, total_steps=total)).width(1) == budget


@pytest.mark.parametrize("ranks", [4, 7, 127, 2**14])
def test_too_many_ranks(ranks: int) -> None:
    """The error names a width that works, and the one below it does not."""
    with pytest.raises(ValueError, match=rf"^max_bits=3 is too narrow for {ranks} ranks") as error:
        Schedule(DynamicBits(budget=3, max_bits=3)).width(ranks)
    needed = int(re.findall(r"max_bits must be at least (\d+)$", str(error.value))[0])
    assert Schedule(DynamicBits(budget=3, max_bits=needed)).width(ranks) == needed
    with pytest.raises(ValueError, match="too narrow"):
        Schedule(DynamicBits(budget=3, max_bits=needed - 1)).width(ranks)


def test_far_too_many_ranks() -> None:
    """No width works."""
    with pytest.raises(ValueError, match=r"too narrow for 32768 ranks.*so 17 bits are needed"):
        Schedule(DynamicBits()).width(2**15)


@pytest.mark.parametrize(
    ("ranks", "error", "message"),
    [
        (0, ValueError, "ranks must be from 1 to 2147483647, got 0"),
        (True, TypeError, "ranks must be an int, got True"),
        (2.0, TypeError, "ranks must be an int, got 2.0"),
    ],
)
def test_no_such_ranks(ranks: Any, error: type[Exception], message: str) -> None:
    """The argument and its range are named."""
    with pytest.raises(error, match=re.escape(message)):
        Schedule(DynamicBits()).width(ranks)


@pytest.mark.parametrize(
    ("width", "error", "message"),
    [
        (1, ValueError, "width must be from 2 to 16, got 1"),
        (17, ValueError, "width must be from 2 to 16, got 17"),
        (8.0, TypeError, "width must be an int, got 8.0"),
    ],
)
def test_no_such_width(width: Any, error: type[Exception], message: str) -> None:
    """Such a step is not counted."""
    schedule = Schedule(DynamicBits())
    with pytest.raises(error, match=re.escape(message)):
        schedule.update(width, 1.0)
    assert schedule.steps == 0
    with pytest.raises(error, match=re.escape(message)):
        wire_bits(width)


def test_asking_changes_nothing() -> None:
    """``width`` can be called any number of times, and for other ranks."""
    schedule = Schedule(DynamicBits())
    drive(schedule, noisy(20))
    before = schedule.state()
    assert len({schedule.width(1) for _ in range(5)}) == 1
    schedule.width(100)
    assert schedule.state() == before


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("total", [None, 100])
def test_a_norm_that_is_none(norm: float, total: int | None) -> None:
    """The step counts as spent; what was known of norms stays as it is."""
    schedule = Schedule(DynamicBits(budget=5, total_steps=total))
    drive(schedule, noisy(10))
    steps, saved, *norms = schedule.state()
    schedule.update(8, norm)
    assert schedule.steps == steps + 1
    assert schedule.state() == [steps + 1, saved - 3 * 2**10, *norms]

    blind = Schedule(DynamicBits(budget=5, total_steps=total))
    spent = []
    for _ in range(100):
        spent.append(blind.width(1))
        blind.update(spent[-1], norm)
    assert costs(spent).mean() == pytest.approx(5, rel=TOLERANCE)


@pytest.mark.parametrize("norm", [5e-324, 1e-300, 1e300, 1.7976931348623157e308])
def test_extreme_norms(norm: float) -> None:
    """Any float64 fits the words."""
    schedule = Schedule(DynamicBits())
    for squared in (norm, 1.0, norm, norm):
        schedule.update(schedule.width(1), squared)
        assert all(0 < word <= WORD_MAX for word in schedule.state())


def test_defaults() -> None:
    """As documented."""
    assert dataclasses.asdict(DynamicBits()) == {
        "budget": 5.0,
        "total_steps": None,
        "form": "nonconvex",
        "contraction": None,
        "min_bits": 2,
        "max_bits": 16,
        "power": 1.0,
    }


def test_equal_options_are_equal() -> None:
    """5 and 5.0 bits are the same, also to a digest of their ``repr``."""
    convex = {"form": "convex", "total_steps": 9}
    assert repr(DynamicBits(5, contraction=1, **convex)) == repr(
        DynamicBits(contraction=1.0, **convex)
    )
    assert DynamicBits(**convex) == DynamicBits(contraction=0.999, **convex)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DynamicBits().budget = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 2},
        {"budget": 16},
        {"budget": 3, "min_bits": 3, "max_bits": 3},
        {"budget": 11.5, "min_bits": 11, "max_bits": 12},
        {"total_steps": 1},
        {"total_steps": 2**31 - 1},
        {"form": "convex", "total_steps": 10, "contraction": 1},
        {"form": "convex", "total_steps": 10, "contraction": 1e-9},
    ],
)
def test_accepted(options: dict[str, Any]) -> None:
    """Both ends of each range are in it, and work."""
    schedule = Schedule(DynamicBits(**options))
    assert set(drive(schedule, noisy(20))) <= set(WIDTHS)


BUDGET = "budget must be from min_bits=2 to max_bits=16, got "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1.9}, BUDGET + "1.9"),
        ({"budget": 17}, BUDGET + "17"),
        ({"budget": math.nan}, BUDGET + "nan"),
        ({"budget": 5, "min_bits": 6}, "budget must be from min_bits=6 to max_bits=16, got 5"),
        ({"min_bits": 1}, "min_bits must be from 2 to 16, got 1"),
        ({"max_bits": 17}, "max_bits must be from 2 to 16, got 17"),
        ({"min_bits": 8, "max_bits": 4}, "min_bits=8 to max_bits=4 must have a width of (2, 3,"),
        ({"min_bits": 13, "max_bits": 15}, "min_bits=13 to max_bits=15 must have a width of"),
        ({"total_steps": 0}, "total_steps must be from 1 to 2147483647 or None (unknown), got 0"),
        ({"form": "linear"}, "form must be one of ('nonconvex', 'convex'), got 'linear'"),
        ({"form": "convex"}, "total_steps must be an int for form='convex', got None"),
        ({"power": 2.1}, "power must be from 0 to 2, got 2.1"),
        ({"contraction": 0}, "contraction must be above 0 and at most 1, got 0"),
        ({"contraction": 1.001}, "contraction must be above 0 and at most 1, got 1.001"),
        ({"contraction": math.nan}, "contraction must be above 0 and at most 1, got nan"),
        ({"contraction": 0.9}, "contraction=0.9 has no effect on form='nonconvex': leave it out"),
    ],
)
def test_out_of_range(options: dict[str, Any], message: str) -> None:
    """The option, what is accepted and the value are named."""
    with pytest.raises(ValueError, match=re.escape(message)):
        DynamicBits(**options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("budget", "5", "budget must be a number of bits, got '5'"),
        ("budget", True, "budget must be a number of bits, got True"),
        ("total_steps", 10.0, "total_steps must be an int or None (unknown), got 10.0"),
        ("total_steps", True, "total_steps must be an int or None (unknown), got True"),
        ("form", None, "form must be one of ('nonconvex', 'convex'), got None"),
        ("contraction", "1", "contraction must be a number, got '1'"),
        ("contraction", True, "contraction must be a number, got True"),
        ("min_bits", 2.0, "min_bits must be an int, got 2.0"),
        ("max_bits", True, "max_bits must be an int, got True"),
    ],
)
def test_wrong_type(name: str, value: Any, message: str) -> None:
    """The option, what it takes and the value are named."""
    with pytest.raises(TypeError, match=re.escape(message)):
        DynamicBits(**{name: value})
