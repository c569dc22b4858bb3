"""Dynamic bit width: more bits while the gradient is large, the same bits on the whole.

DQ-SGD (arXiv 2107.14575) gives step t of T, with a gradient of norm |g_t|, a number of levels a
side that is proportional to the norm, and so a width that follows its logarithm:

    non-convex    s_t = k |g_t|
    convex        s_t = k |g_t| a^((T-t)/2),    a: what a step contracts the loss by

k is not given but follows from a budget, the mean width over the run. A lane that holds the sum of
n codes has the ideal width log2(2 n s + 1). With k such that it is c bits at a typical norm,

    w_t = log2(1 + (2^c - 1) 2^d),    d = log2(s_t / typical s),    whatever n is.

- |g_t| is taken from the step before, as the width must be known before the gradient is.
- c is what the budget has left for each step that is left: feedback that makes up for whatever the
  forecast got wrong.
- The typical s is a forecast for the steps to come, as the budget must last for them. If the norm
  falls, it assumes that log2|g| goes on along a line in sqrt(t): then, if m is its mean so far and
  r = sqrt(t/T), the mean of what is to come is u + (u - m) (1-r)(2+r) / (r(1+r)). For u a short
  average is taken, or noise would be taken for a trend. If the norm rises, it is m: training begins
  with a rise that passes, and bits saved for a further one would be missing there. a^((T-t)/2) is
  known, so its part of the forecast is exact.
- A norm that changes by more than 2^5 in one step shows another loss scale: what is remembered of
  norms moves along.
- w_t never goes so high that the narrowest width to the end would overrun the budget, nor so low
  that the widest could not use it up. So what is owed or saved cannot wind up.
- The wire has only some widths. w_t is met on average, by comparison with frac(t * golden ratio),
  which needs no memory.

Without T there is no end to plan for: the budget is held, and the norm is judged, over the last
``WINDOW`` steps or so.

The state is integers, which cross the wire unchanged. Floats are made from them anew, and rounded
before they are compared, so that equal states give equal widths even if libm differs by an ulp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hvd_gqsgd.checks import check_choice, check_int, check_number, unknown_option

__all__ = ["WIDTHS", "DynamicBits", "Schedule", "check_power", "wire_bits"]

MIN_BITS, MAX_BITS = 2, 16
WORD_MAX = 2**31 - 1
Form = Literal["nonconvex", "convex"]
CONTRACTION = 0.999

WINDOW = 32  # steps that the budget is held over if the end is unknown
RECENT = 8  # steps that the trend is taken from
TREND_MAX = 4.0  # longest forecast, in multiples of what the norm has changed by so far
REACH = 5  # most bits that a norm moves the width by; more in one step is another loss scale

ORIGIN = 2**30  # a word of zero bits; 0 is kept for "unknown"
NORM_UNIT = 2**20  # log2|g| in words: to 2^-20, from -1024 to 1024, as of any float64
BITS_UNIT = 2**10  # bits in words: to 2^-10, up to a million
GOLDEN = 2654435769  # 2^32 / golden ratio


def wire_bits(width: int) -> float:
    """Bits that an element takes on the wire, in lanes of ``width`` bits.

    Lanes fill an int32 where they can, else ``64 // width`` of them go into an int64. Padding of
    the last word of 1024 elements is not counted.

    Raises:
        TypeError: the width is not an int.
        ValueError: it is not from 2 to 16.
    """
    check_int("width", width, MIN_BITS, MAX_BITS)
    return float(width) if 32 % width == 0 else 64 / (64 // width)


def _worth_using(cost: Callable[[int], float]) -> tuple[int, ...]:
    """The widest of the widths that cost the same."""
    widths = range(MIN_BITS, MAX_BITS + 1)
    return tuple(w for w in widths if w == MAX_BITS or cost(w) < cost(w + 1))


# 11 takes as much as 12, and 13 to 15 as much as 16.
WIDTHS = _worth_using(wire_bits)


def check_power(power: object) -> float:
    """Returns the power of a norm that levels follow, as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not from 0 to 2.
    """
    number = check_number("power", power, "a number")
    if not 0 <= number <= 2:
        raise ValueError(f"power must be from 0 to 2, got {power!r}")
    return number


@dataclass(frozen=True)
class DynamicBits:
    """A width for each step, which follows the norm of the gradient, within a budget of mean bits.

    The rule is that of DQ-SGD (arXiv 2107.14575), with feedback that holds the budget. See
    ``hvd_gqsgd/codecs/bit_schedule.py`` and section 6 of ``docs/THEORY.md``.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range, or does not go with another one.
    """

    budget: float = 5.0
    """Mean bits per element that the codes take on the wire; norms and padding are extra."""
    total_steps: int | None = None
    """Steps of the run, over which the budget is held; ``None`` holds it over about 32 steps."""
    form: Form = "nonconvex"
    """The rule of the paper for this kind of loss. ``"convex"`` gives more bits to later steps, and
    needs ``total_steps``."""
    contraction: float | None = None
    """The factor by which a step reduces the loss, above 0 and at most 1; for ``form="convex"``
    alone, where ``None`` is 0.999."""
    min_bits: int = 2
    """The narrowest lanes, 2 to 16 bits."""
    max_bits: int = 16
    """The widest lanes, 2 to 16 bits."""
    power: float = 1.0
    """Levels are proportional to this power of the gradient's norm, from 0 to 2; 1 in the paper."""

    def __new__(cls, *args: Any, **given: Any) -> DynamicBits:
        """Names the option that an unknown one may stand for."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise TypeError(unknown_option("DynamicBits()", name, known))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_int("min_bits", self.min_bits, MIN_BITS, MAX_BITS)
        check_int("max_bits", self.max_bits, MIN_BITS, MAX_BITS)
        span = f"min_bits={self.min_bits} to max_bits={self.max_bits}"
        if not any(self.min_bits <= width <= self.max_bits for width in WIDTHS):
            raise ValueError(f"{span} must have a width of {WIDTHS} in it")
        if hasattr(self.budget, "budget"):
            raise TypeError(
                f"budget must be a number of bits, got {self.budget!r}: for widths per step and "
                "per block pass BlockBits(DynamicBits(...))"
            )
        budget = check_number("budget", self.budget, "a number of bits")
        power = check_power(self.power)
        if not self.min_bits <= budget <= self.max_bits:
            raise ValueError(f"budget must be from {span}, got {self.budget!r}")
        if self.total_steps is not None:
            check_int("total_steps", self.total_steps, 1, WORD_MAX, " or None (unknown)")
        check_choice("form", self.form, get_args(Form))
        if self.form == "convex" and self.total_steps is None:
            raise ValueError("total_steps must be an int for form='convex', got None")
        object.__setattr__(self, "budget", budget)
        object.__setattr__(self, "power", power)
        if self.form == "convex" or self.contraction is not None:
            object.__setattr__(self, "contraction", self._checked_contraction())

    def _checked_contraction(self) -> float:
        if self.contraction is None:
            return CONTRACTION
        contraction = check_number("contraction", self.contraction, "a number")
        if not 0 < contraction <= 1:
            raise ValueError(f"contraction must be above 0 and at most 1, got {self.contraction!r}")
        if self.form != "convex":
            raise ValueError(
                f"contraction={self.contraction!r} has no effect on form='nonconvex': leave it "
                "out, or give form='convex'"
            )
        return contraction


class Schedule:
    """Chooses the width of each step: ``width``, the step, then ``update``.

    Ranks that have made the same updates choose the same widths. The state is five words: steps
    taken, bits saved, or owed if negative, and log2|g| of the last step, of late, and on average.

    Args:
        dynamic: the budget and the rule.
        cost: bits an element that a width takes on the wire.
    """

    learns = True
    STATE_WORDS = 5
    _KEYS = ("steps", "saved", "last", "recent", "mean")

    def __init__(self, dynamic: DynamicBits, cost: Callable[[int], float] = wire_bits) -> None:
        self.dynamic = dynamic
        self._cost = cost
        self._widths = _worth_using(cost)
        self._words = [0] * self.STATE_WORDS

    @property
    def steps(self) -> int:
        """Updates so far, those of a run that was taken over included."""
        return self._words[0]

    def width(self, ranks: int) -> int:
        """The width for the coming step, one of those worth using. Changes nothing.

        Args:
            ranks: how many codes a lane must hold the sum of.

        Raises:
            TypeError: ``ranks`` is not an int.
            ValueError: it is not positive, or ``max_bits`` is too narrow for that many.
        """
        widths = self.usable(ranks)
        costs = [self._cost(width) for width in widths]
        bits = self._wanted(costs[0], costs[-1])
        index = max(i for i, cost in enumerate(costs) if cost <= bits)
        if index + 1 < len(costs):
            share = (bits - costs[index]) / (costs[index + 1] - costs[index])
            index += self.steps * GOLDEN % 2**32 < round(share * 2**16) * 2**16
        return widths[index]

    def update(self, width: int, squared_norm: float) -> None:
        """Counts a step of this width, and learns from |g|^2 of the gradient that it gave.

        A norm that is zero, infinite or not a number, as when a gradient scaler skips the step,
        teaches nothing.

        Raises:
            TypeError: the width is not an int.
            ValueError: it is not from 2 to 16.
        """
        steps, saved, last, recent, mean = self._words
        earned = round((self.dynamic.budget - self._cost(width)) * BITS_UNIT)
        saved = (saved or ORIGIN) + earned
        known = self._steps_left() is not None
        if not known:  # else ranks that need more than the budget would run up what none can pay
            limit = WINDOW * REACH * BITS_UNIT
            saved = min(max(saved, ORIGIN - limit), ORIGIN + limit)
        steps = min(steps + 1, WORD_MAX)
        if math.isfinite(squared_norm) and squared_norm > 0:
            norm = ORIGIN + round(math.log2(squared_norm) / 2 * NORM_UNIT)
            jump = norm - recent if last and abs(norm - last) > REACH * NORM_UNIT else 0
            last = norm
            recent = _average(recent, jump, norm, min(steps, RECENT))
            mean = _average(mean, jump, norm, steps if known else min(steps, WINDOW))
        self._words = [steps, _word(saved), last, recent, mean]

    def state(self) -> list[int]:
        """``STATE_WORDS`` ints from 0 to 2^31 - 1; all zeros if and only if nothing happened yet.

        The elementwise maximum over ranks that agree, and newcomers, is the state of those that
        agree.
        """
        return list(self._words)

    def adopt(self, words: Sequence[int]) -> None:
        """Takes over a state.

        Raises:
            TypeError: a word is not an int.
            ValueError: there are more or less than ``STATE_WORDS``, or one is out of range.
        """
        if len(words) != self.STATE_WORDS:
            raise ValueError(f"a state must have {self.STATE_WORDS} words, got {len(words)}")
        for key, word in zip(self._KEYS, words, strict=True):
            check_int(key, word, 0, WORD_MAX)
        # No step, no history: nothing that could be learned from such words would be true.
        self._words = list(words) if words[0] else [0] * self.STATE_WORDS

    def state_dict(self) -> dict[str, Any]:
        """The state by name, for a checkpoint. Options are not in it."""
        return dict(zip(self._KEYS, self._words, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` gave.

        Raises:
            TypeError: ``state`` is not a dict, or a value not an int.
            ValueError: keys are missing or unknown, or a value is out of range.
        """
        if not isinstance(state, dict):
            raise TypeError(f"the state of a schedule must be a dict, got {state!r}")
        if state.keys() != set(self._KEYS):
            raise ValueError(
                f"the state of DynamicBits must have the keys {self._KEYS}, got {tuple(state)}; "
                "give bits as when the state was saved"
            )
        self.adopt([state[key] for key in self._KEYS])

    def usable(self, ranks: int) -> list[int]:
        """Those worth using, within the options, that leave each rank a level a side."""
        check_int("ranks", ranks, 1, WORD_MAX)
        needed = (2 * ranks).bit_length()  # 2^w - 1 >= 2 * ranks
        low, high = max(self.dynamic.min_bits, needed), self.dynamic.max_bits
        widths = [width for width in self._widths if low <= width <= high]
        if not widths:
            wide = [width for width in self._widths if width >= needed]
            remedy = f"max_bits must be at least {wide[0]}" if wide else f"{needed} bits are needed"
            raise ValueError(
                f"max_bits={high} is too narrow for {ranks} ranks: a lane must hold the sum of "
                f"{ranks} codes from 0 to 2, so {remedy}"
            )
        return widths

    def _steps_left(self) -> int | None:
        """Steps to the end; ``None`` if unknown, as it is once the end has passed."""
        total = self.dynamic.total_steps
        return None if total is None or self.steps >= total else total - self.steps

    def _wanted(self, least: float, most: float) -> float:
        """Wire bits that the coming step should take, a real number from ``least`` to ``most``."""
        left = self._steps_left() or WINDOW
        saved = (self._words[1] - ORIGIN) / BITS_UNIT if self._words[1] else 0.0
        funds = self.dynamic.budget * left + saved
        typical = 2 ** min(max(funds / left, 0.0), most) - 1  # 2 n s at the typical norm
        bits = math.log2(1 + typical * 2 ** self._excess())
        # Within what there is to spend, less what the steps after this one can take.
        bits = min(max(bits, funds - (left - 1) * most), funds - (left - 1) * least)
        return min(max(bits, least), most)

    def _excess(self) -> float:
        """log2 of the coming step's s over the typical s of the steps to come."""
        _, _, last, recent, mean = self._words
        left = self._steps_left()
        excess = 0.0
        if last and recent and mean:
            trend = -1.0  # what is to come is as what was
            if left is not None and recent < mean:
                r = math.sqrt(self.steps / (self.steps + left))
                trend = min((1 - r) * (2 + r) / (r * (1 + r)), TREND_MAX)
            excess = (last - recent - trend * (recent - mean)) / NORM_UNIT
            excess *= self.dynamic.power
        if left is not None and self.dynamic.contraction is not None:
            # a^(left/2), over its geometric mean from here to the end
            excess += left / 4 * math.log2(self.dynamic.contraction)
        return min(max(excess, -REACH), REACH)


def _average(average: int, jump: int, norm: int, steps: int) -> int:
    """The average over ``steps`` norms of which this is the last, the others moved by ``jump``."""
    moved = average + jump
    return _word(moved + round((norm - moved) / steps)) if average else norm


def _word(value: int) -> int:
    """The nearest word that is known."""
    return min(max(value, 1), WORD_MAX)
