"""The rule of ``bits="auto"``: which setting the next step takes, from the times of those before.

It sees one number a step, reduced over the ranks, and is a function of these numbers alone, in
integers: ranks that have seen the same steps take the same setting in the same step.

- The run starts with the first arm, uncompressed, and measures a window of steps: the *base*.
- Arms that are predicted to be faster, by more than the noise of the steps, are tried, the fastest
  first, for a few steps each. An arm is kept if its median beats the best one by more than the
  noise and ``MARGIN``, and still does when the best one has been measured once more: other load
  comes in bursts. A trial that is too close to call is prolonged, at most to the last of
  ``TRIALS``.
- What steps of a trial take longer than the base is charged, and trials end when the budget is used
  up: a hundredth of the run's time, with an advance; with a compressed arm, that comes on top.
- After that, windows of steps are compared with the base, and the base with its first value. A
  difference beyond the noise that lasts says that the link or the model's step has changed: then
  all arms are predicted and tried anew, unless the base is as it was before the last change.
- At growing intervals an arm that was close is tried again, or the uncompressed one, whatever was
  measured before, if the budget has room for what the last trial of that arm lost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from hvd_gqsgd.auto.seen import UNKNOWN, Seen, median, spread_of
from hvd_gqsgd.checks import check_int

__all__ = ["Chooser", "Decision"]

WARM = 1
"""Steps after a change of the arm that are not measured: they open connections and take memory."""
LAG = 1
"""Steps with an arm after the last one that is measured, as messages take a step."""
WINDOW, LONGEST = 5, 12
"""The fewest and the most steps of which the median is compared with the base."""
LENGTH = 75_000
"""Microseconds of such a window, as each has a message; in ``LONGEST`` steps at most."""
START = 3
"""Steps of the first window."""
MOST = WARM + LONGEST
"""Steps that ``needs`` is at most."""
TRIALS = (1, 3, 8, 20)
"""Steps after which a trial is judged; all but the last time it may be too close to call."""
HOPELESS = 4
"""The first step of a trial is enough if it is slower by one part in so many, beyond the noise."""
SURE = 4
"""A difference of medians of n and m steps is more than noise if it is larger than this many times
the noise of a step times sqrt(1/n + 1/m): with normal times, 2.1 standard deviations."""
BASE = 10
"""Steps that the base is worth."""
MARGIN = 32
"""An arm must be faster by one part in so many."""
CHANGE = 7
"""A window that differs from the base by one part in so many shows a change, unless the noise is
larger."""
LASTS, MOST_LASTS = 2, 6
"""Windows until a difference is a change: one more after each change that led to no decision."""
LARGE = 3
"""Windows that take so many times the base, or one part in so many of it, need one less."""
DRIFT = 2
"""A base that differs from its first value by one part in ``CHANGE``, and by more than this many
times the noise of a step, shows a slow change."""
ADVANCE = 2
"""Steps of the advance."""
RETRY = 25
"""Steps until arms are tried again, after a change."""
CLEAR = 4
"""An arm that is so many times faster is taken after one more step with the best one."""
CLOSE = 8
"""An arm is close if it is slower by less than one part in so many."""


class Decision(NamedTuple):
    """A change of the setting that was measured to be the fastest."""

    arm: int
    before: Seen
    after: Seen


Predict = Callable[[int, Seen], Sequence[int]]
"""Predicted ``busy`` of each arm, given one of them and its times."""


class Chooser:
    """Chooses among numbered arms, of which 0 is uncompressed.

    Args:
        arms: how many there are.
        predict: the times of all arms by those of one.
        allowed: the arms that may be taken; None: all.
    """

    def __init__(self, arms: int, predict: Predict, allowed: Collection[int] | None = None) -> None:
        self._arms = arms
        self._predict = predict
        self._allowed = set(range(arms)) if allowed is None else {0, *allowed}
        self.arm = 0
        """The arm of the coming step."""
        self._best = 0
        self._base = UNKNOWN  # of the best arm
        self._noise = 0  # of a step's time
        self._known = [UNKNOWN] * arms  # as measured since the last change
        self._tried = [0] * arms  # when, as ``_elapsed``
        self._queue: list[int] = []  # arms to try, this one included
        # By how much the last trial of a compressed arm took longer than predicted, and the time
        # that was predicted; None: there was no trial.
        self._missed: list[tuple[int, int] | None] = [None] * arms
        self._unsure: set[int] = set()  # arms that were tried since the last window like the base
        self._claim = UNKNOWN  # of an arm that is tried, if it seems to be the fastest
        self._deviates = 0  # windows above the base, one after the other; below it: negative
        self._lasts = LASTS  # windows until that is a change
        self._former = self._known  # before the last change
        self._elapsed = self._spent = 0
        self._limit = 0  # of ``_spent``, at which trials end
        self._lost = [0] * arms  # by the last trial
        self._wait = self._retry_at = 0
        self._window: list[Seen] = []
        self._skip = WARM

    @property
    def best(self) -> int:
        """The arm that was measured to be the fastest."""
        return self._best

    @property
    def settled(self) -> bool:
        """Whether no arm is being tried."""
        return bool(self._base.busy) and not self._queue

    @property
    def needs(self) -> int:
        """How many more steps must be learned until the arm may change, if no more than ``MOST``;
        the same wherever the same steps were learned."""
        if self._claim.busy:
            return 1
        goals = TRIALS if self._queue else (self._goal,)
        steps = len(self._window)
        return min(self._skip + min(goal for goal in goals if goal > steps) - steps, MOST)

    @property
    def _goal(self) -> int:
        """Steps of the window."""
        if not self._base.busy:
            return START
        if self._deviates:
            return WINDOW
        return min(max(LENGTH // max(self._base.period, 1), WINDOW), LONGEST)

    def learn(self, seen: Seen) -> Decision | None:
        """Takes in the times of a step with the current arm.

        Returns:
            The decision, if another arm has become the best one.
        """
        self._elapsed += seen.period
        if self._queue:
            lost = max(seen.busy - (self._claim.busy or self._base.busy), 0)
            self._spent += lost
            self._lost[self.arm] += lost
        if self._skip:
            self._skip -= 1
            return None
        self._window.append(seen)
        if self._claim.busy:
            return self._confirm()
        if self._queue:
            self._try()
            return None
        if len(self._window) >= self._goal:
            self._watch()
        return None

    def restart(self) -> None:
        """Discards unfinished windows and trials, as ranks have come or gone."""
        if self._queue:
            self._queue.clear()
            self._claim = UNKNOWN
            self._retry_at = self._elapsed
        self._take(self._best)

    def state(self) -> list[int]:
        """Non-negative ints, as many for each number of arms."""
        return [
            self._best, *self._base, self._noise, self._elapsed, self._spent, self._wait,
            self._retry_at, *self._tried, *itertools.chain(*self._known),
        ]  # fmt: skip

    def adopt(self, words: Sequence[int]) -> None:
        """Takes over a state.

        Raises:
            TypeError: a word is not an int.
            ValueError: it is of another number of arms.
        """
        if not isinstance(words, list | tuple):
            raise TypeError(f"a state must be a list of ints, got {words!r}")
        if len(words) != len(self.state()):
            raise ValueError(f"a state of {self._arms} arms expected, got {list(words)}")
        for word in words:
            check_int("a word of the state", word, 0, 2**63 - 1)
        check_int("the arm of the state", words[0], 0, self._arms - 1)
        self._best, busy, held, period, self._noise = words[:5]
        self._base = Seen(busy, held, period)
        self._elapsed, self._spent, self._wait, self._retry_at, *rest = words[5:]
        self._tried, known = rest[: self._arms], rest[self._arms :]
        self._known = [
            Seen(*known[3 * arm : 3 * arm + 3]) if arm in self._allowed else UNKNOWN
            for arm in range(self._arms)
        ]
        if self._best not in self._allowed:
            self._best = 0
            self.forget()
        self.restart()

    def forget(self) -> None:
        """Discards all measured times, as with another number of ranks."""
        self._base = UNKNOWN
        self._known = [UNKNOWN] * self._arms

    def begin_uncompressed(self) -> None:
        """Takes no arm but the uncompressed one for the coming step."""
        self._take(0)

    def _take(self, arm: int) -> None:
        """Makes an arm the current one."""
        if arm != self.arm:
            self._skip, self._lost[arm] = WARM, 0
        self.arm = arm
        self._window.clear()
        self._deviates = 0

    def _watch(self) -> None:
        """Compares a window of the best arm with the base."""
        now, spread = median(self._window), spread_of(self._window)
        self._window.clear()
        then, first = self._known[self._best].busy, not self._base.busy
        if first:
            # A window with a change in its middle has a large spread, which is no noise.
            self._noise = min(max(spread, now.busy // 32), now.busy // 4)
            changed, self._base = False, now
        else:
            changed = self._shows_change(now)
            if not changed:
                if self._deviates:
                    return
                self._merge(now, spread)
                changed = abs(self._base.busy - then) > max(then // CHANGE, DRIFT * self._noise)
        if first or changed:
            self._start_anew()
            self._wait = RETRY * now.period
        elif self._elapsed < self._retry_at:
            return
        self._retry_at = self._elapsed + self._wait
        self._wait += self._wait // 2
        budget, advance = self._elapsed // 100, ADVANCE * now.period
        left = (budget + advance if self._best else max(budget, advance)) - self._spent
        if changed:
            # A change in the middle of a trial is no loss by the trial. Where a link has become
            # faster, trials may lose the difference of as many steps.
            left = max(left, advance) + ADVANCE * max(then - self._base.busy, 0)
            self._spent = min(self._spent, budget)
        self._limit = self._spent + left
        loss = left // (WARM + TRIALS[1] + LAG)
        if left > 0:
            self._queue = self._unknown(loss) if first or changed else self._again(loss)
        if self._queue:
            self._take(self._queue[0])

    def _shows_change(self, now: Seen) -> bool:
        """Whether a window, after those before, shows a change; then it is the base."""
        off, base = now.busy - self._base.busy, self._base.busy
        sign = 0 if abs(off) <= max(base // CHANGE, SURE * self._noise) else 1 if off > 0 else -1
        self._deviates = self._deviates + sign if sign * self._deviates > 0 else sign
        large = now.busy > LARGE * base or base > LARGE * now.busy
        if not sign or abs(self._deviates) < self._lasts - large:
            return False
        self._noise = self._noise * now.busy // base
        self._base = now
        self._lasts = min(self._lasts + 1, MOST_LASTS)
        self._deviates = 0
        return True

    def _merge(self, now: Seen, spread: int) -> None:
        """Takes a window without a change into the base."""
        self._unsure.clear()
        self._base = Seen(*((3 * old + new) // 4 for old, new in zip(self._base, now, strict=True)))
        self._noise = (3 * self._noise + min(spread, 2 * self._noise)) // 4 + 1

    def _start_anew(self) -> None:
        """Discards the times of all other arms. If the base is as it was before the last change,
        those from then replace them."""
        for arm in self._unsure:  # the change may have come in the middle of the trial
            self._known[arm], self._missed[arm] = UNKNOWN, None
        self._unsure.clear()
        former, self._former = self._former, self._known
        was = former[self._best].busy
        same = abs(self._base.busy - was) <= was // CHANGE
        self._known = [*former] if same else [UNKNOWN] * self._arms
        self._known[self._best] = self._base

    def _unknown(self, loss: int) -> list[int]:
        """The arms to try after a change: those that are predicted to be faster, or else the
        uncompressed one, if a step with it loses no more than ``loss``."""
        times = self._times()
        others = sorted(self._allowed - {self._best}, key=times.__getitem__)
        fast = self._base.busy - max(self._base.busy // MARGIN, self._noise)
        faster = [arm for arm in others if times[arm] < fast]
        affordable = self._best != 0 and times[0] < self._base.busy + loss
        return faster or [0] * affordable

    def _again(self, loss: int) -> list[int]:
        """The arm to try again: of those that are close, and the uncompressed one, the one that was
        tried longest ago, if a step with it loses no more than ``loss``, and a trial no more than
        is left."""
        # Other load may have been beside the trials.
        self._missed = [each and (3 * each[0] // 4, each[1]) for each in self._missed]
        self._lost = [3 * lost // 4 for lost in self._lost]
        times, close = self._times(), min(loss, self._base.busy // CLOSE)
        again = [
            arm
            for arm in self._allowed - {self._best}
            if times[arm] < self._base.busy + (close - self._noise if arm else loss)
            and self._spent + self._lost[arm] < self._limit
        ]
        return sorted(again, key=lambda arm: (self._tried[arm], times[arm], arm))[:1]

    def _times(self) -> list[int]:
        """``busy`` of all arms: measured since the last change, or else the least that a measured
        arm predicts, corrected by the arm's last trial. While no compressed arm is the best one,
        what two and more of them missed by is expected of the others too."""
        predicted = [self._predict(arm, seen) for arm, seen in enumerate(self._known) if seen.busy]
        guesses = [min(times) for times in zip(*predicted, strict=True)]
        tried = [missed for missed in self._missed if missed is not None]
        others = tried if len(tried) > 1 and self._best == 0 else []
        times = []
        for arm, (seen, guess) in enumerate(zip(self._known, guesses, strict=True)):
            own = self._missed[arm]
            expected = [own] if own is not None else others if arm else []
            # A cost of computing stays the same on another link, one of bytes stays proportional.
            off = min((min(missed, guess * missed // of) for missed, of in expected), default=0)
            times.append(seen.busy or guess + off)
        return times

    def _try(self) -> None:
        """Judges the arm that is being tried, once that can be done."""
        steps = len(self._window)
        if steps not in TRIALS:
            return
        now = median(self._window)
        gain = self._base.busy - now.busy
        squared = (SURE * self._noise) ** 2 * (steps + BASE) // (steps * BASE)
        least = max(self._base.busy // MARGIN, math.isqrt(squared))
        close = 0 <= gain <= least
        if steps == TRIALS[0] and -gain <= max(self._base.busy // HOPELESS, least):
            return
        if close and steps < TRIALS[-1] and self._spent < self._limit:
            return
        self._spent += max(-gain, 0) * LAG
        # One step may have been slow by chance: the arm is as predicted, and what that missed.
        self._known[self.arm] = now if steps > TRIALS[0] else UNKNOWN
        self._tried[self.arm] = self._elapsed
        if self.arm:
            guess = self._predict(self._best, self._base)[self.arm]
            self._missed[self.arm] = (max(now.busy - guess, 0), guess)
        self._unsure.add(self.arm)
        if gain > least:
            self._claim = now
            self._take(self._best)
        else:
            self._next()

    def _confirm(self) -> Decision | None:
        """Takes an arm that seems to be the fastest, if half of its gain is found again."""
        steps, claim = len(self._window), self._claim
        now = median(self._window)
        if steps < TRIALS[1] and now.busy < CLEAR * claim.busy:
            return None
        gain, before, decision = now.busy - claim.busy, self._base.busy, None
        self._claim = UNKNOWN
        self._spent += max(gain, 0) * LAG
        self._known[self._best] = self._base = now
        if gain > max((before - claim.busy) // 2, now.busy // MARGIN):
            arm = self._queue[0]
            decision = Decision(arm, now, claim)
            self._best, self._base, self._lasts = arm, claim, LASTS
        elif before - now.busy > before // CHANGE:  # the other load is gone
            self._start_anew()
        self._next()
        return decision

    def _next(self) -> None:
        """Ends a trial, and begins the next one."""
        times = self._times()
        left = self._queue[1:] if self._spent < self._limit else []
        self._queue = [arm for arm in left if times[arm] < self._base.busy]
        self._take(self._queue[0] if self._queue else self._best)
