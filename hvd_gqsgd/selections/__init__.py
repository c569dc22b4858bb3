"""Selections of the elements of a gradient that are exchanged, in front of the codecs.

A selection cuts a tensor in groups of consecutive units, and takes one unit of each. A unit is an
element, or a run of elements. All ranks take the same ones, so that their codes can be added,
except in a permutation, whose codes are gathered. With error feedback each rank keeps tensors
between steps; see ``feedback``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_gqsgd.selections.base import Chosen, Selection
from hvd_gqsgd.selections.feedback import Estimates, Feedback, WholeDifferences, feedback_of
from hvd_gqsgd.selections.leader import LeaderSelection
from hvd_gqsgd.selections.memory import Memory
from hvd_gqsgd.selections.random_runs import RandomSelection

if TYPE_CHECKING:
    from hvd_gqsgd.options import Options

__all__ = [
    "SELECTIONS",
    "Chosen",
    "Estimates",
    "Feedback",
    "LeaderSelection",
    "Memory",
    "RandomSelection",
    "Selection",
    "WholeDifferences",
    "feedback_of",
    "selection_of",
]

SELECTIONS: dict[str, type[RandomSelection | LeaderSelection]] = {
    "random": RandomSelection, "permutation": RandomSelection, "leader": LeaderSelection,
}  # fmt: skip
"""The class for each value of the option ``select``."""


def selection_of(options: Options, rank: int, size: int) -> RandomSelection | LeaderSelection:
    """The selection that the options ask for, of one rank."""
    kind = options.error_feedback
    return SELECTIONS[options.select](
        round(1 / options.keep), options.seed, rank, size, kind is not None, kind == "marina"
    )
