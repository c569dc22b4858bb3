"""The state of a schedule: words that survive the wire, and checkpoints."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import drive, jumping_noisily, noisy

from hvd_gqsgd.codecs.bit_schedule import WIDTHS, DynamicBits, Schedule

WORD_MAX = 2**31 - 1


def test_no_history_is_all_zeros() -> None:
    """And nothing else is, not even after a step that taught nothing."""
    schedule = Schedule(DynamicBits())
    assert schedule.state() == [0] * Schedule.STATE_WORDS
    schedule.update(5, math.nan)
    assert any(schedule.state())
    schedule.adopt([0] * Schedule.STATE_WORDS)
    assert schedule.steps == 0 and not any(schedule.state())
    schedule.adopt([0, 1, 2, 3, 4])
    assert schedule.state() == [0] * Schedule.STATE_WORDS


@pytest.mark.parametrize("total", [None, 200, 600])
@pytest.mark.parametrize("after", [1, 2, 300])
def test_a_newcomer_goes_on_like_the_survivors(total: int | None, after: int) -> None:
    """It takes the maximum of its zeros and their words, and chooses their widths from then on."""
    dynamic = DynamicBits(total_steps=total)
    norms = jumping_noisily(600)
    survivor, newcomer, untouched = Schedule(dynamic), Schedule(dynamic), Schedule(dynamic)
    for schedule in (survivor, untouched):
        drive(schedule, norms[:after])
    words = list(map(max, survivor.state(), newcomer.state()))
    assert words == survivor.state()
    survivor.adopt(words)
    newcomer.adopt(words)
    rest = [drive(schedule, norms[after:]) for schedule in (untouched, survivor, newcomer)]
    assert rest[0] == rest[1] == rest[2]
    assert untouched.state() == survivor.state() == newcomer.state()
    assert newcomer.steps == 600


@pytest.mark.parametrize("total", [None, 300])
def test_ranks_whose_norms_differ_slightly_stay_together(total: int | None) -> None:
    """The maximum of the words before each step brings them to the same width."""
    dynamic = DynamicBits(total_steps=total)
    a, b = Schedule(dynamic), Schedule(dynamic)
    for norm in noisy(300):
        words = list(map(max, a.state(), b.state()))
        a.adopt(words)
        b.adopt(words)
        assert a.width(2) == b.width(2)
        a.update(a.width(2), 4.0**norm)
        b.update(b.width(2), 4.0**norm * (1 + 1e-5))  # much more than ulps: it must show
        assert a.state() != b.state()


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(
        st.integers(0, WORD_MAX) | st.sampled_from([0, 1, 2**30, WORD_MAX]),
        min_size=Schedule.STATE_WORDS,
        max_size=Schedule.STATE_WORDS,
    ),
    total=st.none() | st.integers(1, WORD_MAX) | st.integers(1, 100),
    contraction=st.sampled_from([None, 1.0, 0.999, 1e-300]),
    norm=st.floats(),
)
def test_any_words_are_accepted(
    words: list[int], total: int | None, contraction: float | None, norm: float
) -> None:
    """They come from the wire. Words stay words, and widths legal."""
    convex = {"form": "convex", "contraction": contraction} if contraction and total else {}
    schedule = Schedule(DynamicBits(min_bits=3, max_bits=12, total_steps=total, **convex))  # type: ignore[arg-type]
    schedule.adopt(words)
    assert schedule.state() == (words if words[0] else [0] * Schedule.STATE_WORDS)
    for step in range(4):
        width = schedule.width(1 + step)
        assert width in WIDTHS and (2 * (1 + step)).bit_length() <= width <= 12
        schedule.update(width, norm if step else 1.0)
        assert all(0 <= word <= WORD_MAX for word in schedule.state())


@pytest.mark.parametrize(("saved", "width"), [(1, 16), (WORD_MAX, 2)])
def test_what_is_saved_stays_a_word(saved: int, width: int) -> None:
    """A million bits is the most that it knows of."""
    schedule = Schedule(DynamicBits(total_steps=WORD_MAX))
    schedule.adopt([1000, saved, 0, 0, 0])
    schedule.update(width, 1.0)
    assert schedule.state()[:2] == [1001, saved]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([0, 0], ValueError, "a state must have 5 words, got 2"),
        ([1, 0, 0, 0, 0, 0], ValueError, "a state must have 5 words, got 6"),
        ([1, 2, 3, 4, 2**31], ValueError, "mean must be from 0 to 2147483647, got 2147483648"),
        ([-1, 2, 3, 4, 5], ValueError, "steps must be from 0 to 2147483647, got -1"),
        ([1, 2.0, 3, 4, 5], TypeError, "saved must be an int, got 2.0"),
    ],
)
def test_no_such_words(words: Any, error: type[Exception], message: str) -> None:
    """The word is named, and the state stays as it was."""
    schedule = Schedule(DynamicBits())
    drive(schedule, noisy(3))
    before = schedule.state()
    with pytest.raises(error, match=re.escape(message)):
        schedule.adopt(words)
    assert schedule.state() == before


def test_checkpoint() -> None:
    """Through JSON, so plain numbers; it goes on as if nothing had happened."""
    dynamic = DynamicBits(total_steps=400)
    norms = noisy(400)
    schedule, restored = Schedule(dynamic), Schedule(dynamic)
    drive(schedule, norms[:150])
    restored.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert restored.state() == schedule.state() and restored.steps == 150
    assert drive(restored, norms[150:]) == drive(schedule, norms[150:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": "3"}, TypeError, "steps must be an int, got '3'"),
        ({"recent": 1.5}, TypeError, "recent must be an int, got 1.5"),
        ({"saved": -1}, ValueError, "saved must be from 0 to 2147483647, got -1"),
        ({"colour": 1}, ValueError, "must have the keys ('steps', 'saved', 'last', 'recent'"),
    ],
)
def test_no_such_checkpoint(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """What is wrong is named."""
    schedule = Schedule(DynamicBits())
    with pytest.raises(error, match=re.escape(message)):
        schedule.load_state_dict({**schedule.state_dict(), **change})


def test_no_checkpoint_at_all() -> None:
    """Neither something else, nor a part."""
    schedule = Schedule(DynamicBits())
    with pytest.raises(TypeError, match="must be a dict, got None"):
        schedule.load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \('steps',\)"):
        schedule.load_state_dict({"steps": 0})
