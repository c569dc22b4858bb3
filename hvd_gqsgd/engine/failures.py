"""The failure policy: how a step ends that was not completed.

    what happened here            the other ranks       rest and new names
    DISAGREEMENT  AgreementError  see the same error    yes
                  an error that   see AgreementError
                  messages told
    GIVEN_UP      tickets dropped know nothing of it,   yes
                  early           and wait
    DROPPED       tickets dropped complete the step     no
                  after this rank
                  did its part
    BROKEN        transport error have errors too       no
    RESTARTED     Horovod began   are in the new        no
                  anew            session too

The rest: the collectives that other ranks may wait for are started, with messages that mean
nothing, so that none stays in flight for ever. Where a first message decides which these are, a
rank that has given up waits for one first. New names: messages of later steps have other names
than those of this step, which may stay in flight.
"""

from __future__ import annotations

from enum import Enum

from hvd_gqsgd.errors import AgreementError

__all__ = ["Ending"]


class Ending(Enum):
    """A row of the table above."""

    DISAGREEMENT = 1
    GIVEN_UP = 2
    DROPPED = 3
    BROKEN = 4
    RESTARTED = 5

    @classmethod
    def of(cls, error: Exception) -> Ending:
        """The row for an error that a collective ended with."""
        return cls.DISAGREEMENT if isinstance(error, AgreementError) else cls.BROKEN

    @property
    def starts_rest(self) -> bool:
        """Whether the remaining collectives are started, and messages of later steps get new
        names."""
        return self in (Ending.DISAGREEMENT, Ending.GIVEN_UP)
