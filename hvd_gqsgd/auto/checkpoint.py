"""The state of ``bits="auto"`` in a checkpoint, as ``state_dict`` gives it."""

from __future__ import annotations

from typing import Any

from hvd_gqsgd.auto.chooser import Chooser
from hvd_gqsgd.auto.seen import Seen
from hvd_gqsgd.checks import check_int, check_step
from hvd_gqsgd.plan import SETTING_NAMES, Plan, check_plan

__all__ = ["checked_state", "no_state"]


def no_state() -> list[int]:
    """The measured times before the first step, as ``Chooser.state`` returns them."""
    return Chooser(len(SETTING_NAMES), _unused).state()


def checked_state(state: Any) -> tuple[int, int, list[int], Plan]:
    """The number of the coming step, the ranks, the measured times, and the plan so far.

    Raises:
        TypeError, ValueError: it is not a result of ``state_dict``.
    """
    if not isinstance(state, dict):
        raise TypeError(f"a state must be a dict, got {state!r}")
    schedule = state.get("schedule")
    if (
        state.keys() != {"step", "schedule"}
        or not isinstance(schedule, dict)
        or schedule.keys() != {"ranks", "words", "plan"}
    ):
        raise ValueError(
            'the state of bits="auto" must have the keys step and schedule, and the schedule '
            f"ranks, words and plan; give bits as when the state was saved; got {state!r}"
        )
    check_step(state["step"])
    check_int("ranks", schedule["ranks"], 0, 2**31 - 1)
    Chooser(len(SETTING_NAMES), _unused).adopt(schedule["words"])
    plan = schedule["plan"]
    checked = Plan(check_plan(plan) if plan != [] else ())  # empty before the first step
    return state["step"], schedule["ranks"], list(schedule["words"]), checked


def _unused(arm: int, seen: Seen) -> list[int]:
    raise AssertionError("a state alone predicts nothing")
