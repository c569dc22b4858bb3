"""The number of a step and the width of its lanes, and all state that a checkpoint needs.

A compressor owns one ``Steps``. The pipelines of its front ends share it, so that its state is that
of the training, whichever front end is used.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd.checks import check_step
from hvd_gqsgd.codecs.bit_schedule import DynamicBits, Schedule
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.schedules import FixedBits, make_schedule
from hvd_gqsgd.engine.agreement import Agreement
from hvd_gqsgd.option_types import ErrorFeedback
from hvd_gqsgd.selections.memory import Memory

__all__ = ["StepRecord", "Steps"]


class StepRecord:
    """The step that one pipeline is in.

    Args:
        number: of the record, in the order that all ranks make them in.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.bits = 0
        """Width of the lanes, as settled by the ranks."""
        self.tickets: weakref.WeakSet[Any] = weakref.WeakSet()
        """Tickets that are neither decoded nor dropped."""
        self._undecoded = 0
        # Squared norms of the decoded tensors; on a GPU not waited for before the next step.
        self._squares: list[Tensor] = []

    def submitted(self, ticket: object) -> None:
        """Counts a tensor."""
        self.tickets.add(ticket)
        self._undecoded += 1

    def decoded(self, ticket: object, squared_norm: Tensor | None) -> None:
        """Counts a decoded tensor."""
        self.tickets.discard(ticket)
        self._undecoded -= 1
        if squared_norm is not None:
            self._squares.append(squared_norm)

    def forget(self) -> None:
        """Ends the step; nothing is learned from it."""
        self.tickets.clear()
        self._undecoded = 0
        self.unlearn()

    def unlearn(self) -> None:
        """Drops the norms of the step."""
        self._squares.clear()

    def teach(self, schedule: FixedBits | Schedule) -> None:
        """Updates a schedule by the norm of the step's gradient, if all of it was decoded."""
        if self._squares and not self._undecoded:
            schedule.update(self.bits, math.fsum(_numbers(self._squares)))


class Steps:
    """Counts steps, and chooses the width of each from the gradients of the steps before.

    Args:
        bits: a width, how it follows the training, or how it follows the norms of blocks.
        step: number of the first step.
        feedback: the option ``error_feedback``.
    """

    def __init__(
        self, bits: int | DynamicBits | BlockBits, step: int = 0,
        feedback: ErrorFeedback | None = None,
    ) -> None:  # fmt: skip
        self._next_step = step
        self._schedule = make_schedule(bits)
        self.memory = Memory(feedback)
        """The tensors that this rank keeps for error feedback."""
        self._begin_records()

    def _begin_records(self) -> None:
        self._records: weakref.WeakSet[StepRecord] = weakref.WeakSet()
        self._records_made = 0
        # Outlives its pipeline, so that the norm of its last step is not lost.
        self._latest: StepRecord | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies go on after all complete steps."""
        return {
            "_next_step": self._next_step,
            "_schedule": self._learned(),
            "memory": copy.deepcopy(self.memory),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin_records()

    @property
    def learns(self) -> bool:
        """Whether the width follows the norms of gradients."""
        return self._schedule.learns

    @property
    def coming(self) -> int:
        """The number of the next step."""
        return self._next_step

    def resume_at(self, step: int) -> None:
        """Makes ``step`` the number of the next step."""
        self._next_step = step

    def record(self) -> StepRecord:
        """A record for a new pipeline, which goes on where the latest one ended."""
        if self._latest is not None:
            self.learn(self._latest)
        record = StepRecord(self._records_made)
        self._records_made += 1
        self._records.add(record)
        return record

    def propose(self, summands: int, step: int | None) -> Agreement:
        """This rank's proposal for the coming step.

        Args:
            summands: codes whose sum a lane must hold.
            step: its number; None: the next one.

        Raises:
            ValueError: the lanes are too narrow.
        """
        number = self._next_step if step is None else step
        width = self._schedule.width(summands)
        self._next_step = number + 1
        return Agreement(number, width, tuple(self._schedule.state()))

    def settle(self, agreement: Agreement, record: StepRecord) -> None:
        """Takes over an agreement of the ranks."""
        self._next_step = max(self._next_step, agreement.step + 1)
        self._schedule.adopt(agreement.schedule)
        record.bits = agreement.bits
        self._latest = record

    def learn(self, record: StepRecord) -> None:
        """Learns from the step of a record, once.

        Not from those of other records: when these are decoded may differ between ranks.
        """
        record.teach(self._schedule)
        record.unlearn()

    def state_dict(self) -> dict[str, Any]:
        """The number of the next step, the state of the schedule after all complete steps, and the
        memory of this rank for error feedback, if it has any.

        Changes nothing, so that one rank alone may ask for it.
        """
        state = {"step": self._next_step, "schedule": self._learned().state_dict()}
        if self.memory:
            state["memory"] = self.memory.state_dict()
        return state

    def _learned(self) -> FixedBits | Schedule:
        """A copy of the schedule after all complete steps."""
        schedule = copy.deepcopy(self._schedule)
        for record in sorted(self._records, key=lambda record: record.number):
            record.teach(schedule)
        return schedule

    def check_idle(self) -> None:
        """Checks that no tensor is in flight, before a state is loaded.

        Raises:
            RuntimeError: one is.
        """
        if any(record.tickets for record in self._records):
            raise RuntimeError("a state cannot be loaded while gradients are in flight")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a state; the next step continues from it.

        Raises:
            TypeError, ValueError: it is not a result of ``state_dict``.
            RuntimeError: tensors are in flight.
        """
        self.check_idle()
        if not isinstance(state, dict):
            raise TypeError(f"a state must be a dict, got {state!r}")
        if state.keys() - {"memory"} != {"step", "schedule"}:
            raise ValueError(
                "a state must have the keys 'step' and 'schedule', and may have 'memory', got "
                f"{state!r}"
            )
        check_step(state["step"])
        memory = state.get("memory")
        if memory is not None:
            Memory.check_state(memory)
        self._schedule.load_state_dict(state["schedule"])
        self.memory.load_state_dict(memory)
        for record in self._records:
            record.forget()
        self._next_step = state["step"]


def _numbers(scalars: list[Tensor]) -> list[float]:
    """Reads scalars, those of one device at once."""
    on: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for scalar in scalars:
        on[scalar.device].append(scalar)
    return [number for each in on.values() for number in torch.stack(each).tolist()]
