"""The number of a step and the width of its lanes: what a rank proposes and ranks settle on."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.checks import check_int
from hvd_gqsgd.codecs.bit_schedule import DynamicBits, make_schedule
from hvd_gqsgd.engine.buckets import Agreement

__all__ = ["Steps"]


class Steps:
    """Counts steps, and chooses the width of each from the gradients of the ones before."""

    def __init__(self, bits: int | DynamicBits, step: int = 0) -> None:
        self._next_step = step
        self._schedule = make_schedule(bits)
        # Of the tensors decoded in this step; on a GPU not waited for before the next one.
        self._squared_norms: list[Tensor] = []
        self.bits = 0
        """Width of the step's lanes, as the ranks have settled on."""

    def propose(self, summands: int, step: int | None) -> Agreement:
        """For the coming step, of this number or, with None, of the next one.

        Raises:
            ValueError: the lanes are too narrow.
        """
        number = self._next_step if step is None else step
        width = self._schedule.width(summands)
        self._next_step = number + 1
        return Agreement(number, width, tuple(self._schedule.state()))

    def settle(self, agreement: Agreement) -> None:
        """Takes over what the ranks have settled on."""
        self._next_step = max(self._next_step, agreement.step + 1)
        self._schedule.adopt(agreement.schedule)
        self.bits = agreement.bits

    def decoded(self, mean: Tensor) -> None:
        """Looks at a part of the step's gradient."""
        if self._schedule.learns:
            self._squared_norms.append(ops.sum_of_squares(mean))

    def learn(self) -> None:
        """Ends a step of which all parts were decoded."""
        if self._squared_norms:
            self._schedule.update(self.bits, math.fsum(_numbers(self._squared_norms)))
            self.forget()

    def forget(self) -> None:
        """Learns nothing from this step."""
        self._squared_norms.clear()

    def state_dict(self) -> dict[str, Any]:
        """The number of the next step, and the state of the bit width's schedule."""
        return {"step": self._next_step, "schedule": self._schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there with the next step.

        Raises:
            TypeError, ValueError: it is not what ``state_dict`` gives.
        """
        if not isinstance(state, dict):
            raise TypeError(f"a state must be a dict, got {state!r}")
        if state.keys() != {"step", "schedule"}:
            raise ValueError(f"a state must have the keys 'step' and 'schedule', got {state!r}")
        check_int("step", state["step"], 0, 2**30)  # with room for the steps to come
        self._schedule.load_state_dict(state["schedule"])
        self.forget()
        self._next_step = state["step"]


def _numbers(scalars: list[Tensor]) -> list[float]:
    """All of one device at once."""
    on: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for scalar in scalars:
        on[scalar.device].append(scalar)
    return [number for each in on.values() for number in torch.stack(each).tolist()]
