"""The failure policy: how a step ends that was not completed.

    what happened here            the other ranks       the rest   new names   wait
    DISAGREEMENT  AgreementError  see the same error    yes        yes         no
    RANK_LEFT     RankLeftError   see it, but for the   yes        no          yes
                                  one that has left
    GIVEN_UP      tickets dropped know nothing of it,   yes        yes         no
                  early           and wait
    DROPPED       tickets dropped complete the step     no         no          no
                  after this rank
                  did its part
    BROKEN        transport error have errors too       no         no          no
    RESTARTED     Horovod began   are in the new        no         no          no
                  anew            session too

The rest: the collectives that other ranks may wait for are started, with messages that mean
nothing, so that none stays in flight for ever. New names: messages of later steps have other names
than those of this step, which may stay in flight. Wait: names stay, so the rest is waited for.
"""

from __future__ import annotations

from enum import Enum

from hvd_gqsgd.errors import AgreementError, RankLeftError

__all__ = ["Ending"]


class Ending(Enum):
    """A row of the table above."""

    DISAGREEMENT = 1
    RANK_LEFT = 2
    GIVEN_UP = 3
    DROPPED = 4
    BROKEN = 5
    RESTARTED = 6

    @classmethod
    def of(cls, error: Exception) -> Ending:
        """The row for an error that a collective ended with."""
        if isinstance(error, RankLeftError):
            return cls.RANK_LEFT
        return cls.DISAGREEMENT if isinstance(error, AgreementError) else cls.BROKEN

    @property
    def starts_rest(self) -> bool:
        """Whether the remaining collectives are started."""
        return self in (Ending.DISAGREEMENT, Ending.RANK_LEFT, Ending.GIVEN_UP)

    @property
    def renames(self) -> bool:
        """Whether messages of later steps get new names."""
        return self in (Ending.DISAGREEMENT, Ending.GIVEN_UP)

    @property
    def waits(self) -> bool:
        """Whether everything in flight is waited for."""
        return self is Ending.RANK_LEFT
