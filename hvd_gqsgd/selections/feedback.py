"""Error feedback: what a rank keeps of a step for the steps to come, where few elements are sent.

With the gradient g of a rank, the part C(.) of it that is exchanged, and its mean over the ranks:

- ``"residual"``: the part not sent is added to the next gradient (Seide et al., 2014; with the
  low-pass filter ``beta`` of ScaleCom, arXiv 2104.11125, equation 5):

      a = r + g,    r' = (1 - beta) r + beta (a - C(a)),    the result is the mean of C(a)

- ``"ef21"``: ranks send what their gradient differs from its estimate h by, and the result is the
  mean of all estimates (Richtarik, Sokolov and Fatkhullin, arXiv 2106.05203):

      h' = h + C(g - h),    the result is the mean of h'

- ``"econtrol"``: with a residual e in addition, of which a share is sent (Gao, Islamov and Stich,
  arXiv 2311.05645):

      h' = h + C(g - h + eta e),    e' = e + g - h',    the result is the mean of h'

- ``"marina"``: ranks send what their gradient differs from that of the step before by, of which C
  is unbiased, and in some steps all of what it differs from its estimate by (Gorbunov, Burlachenko,
  Li and Richtarik, arXiv 2102.07845):

      h' = h + C(g - g_before),  or  h + Q(g - h),    the result is the mean of h'

Estimates follow the codes that were exchanged, rounding included: their mean over the ranks is the
same number on all ranks only if each rank adds to its own what the others have decoded from it. In
two phases it is that number and what the owners of segments owe; see ``exchanges/owing.py``.
The residual of econtrol has what is owed in each step, as the results lack it.
Residuals have the rounding error too where it is biased (``rounding="nearest"``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hvd_gqsgd.options import Options
from hvd_gqsgd.selections.base import Chosen
from hvd_gqsgd.selections.memory import Memory

__all__ = ["Estimates", "Feedback", "Residual", "WholeDifferences", "feedback_of"]

Take = Callable[[int, torch.dtype, torch.device], Tensor]


class Feedback(ABC):
    """Error feedback of one rank.

    Args:
        memory: of this rank.
        options: of all ranks.
    """

    estimates: ClassVar[bool]
    """Whether the result is an estimate of the whole mean, which all ranks must have alike."""

    def __init__(self, memory: Memory, options: Options) -> None:
        self.memory = memory

    @abstractmethod
    def given(self, identity: int, x: Tensor, take: Take) -> Tensor:
        """The tensor that elements are chosen from, for a gradient ``x``; flat, from ``take``."""

    @abstractmethod
    def learn(
        self, identity: int, given: Tensor, choice: Chosen, own: Tensor | None, mean: Tensor
    ) -> None:
        """Takes over a step whose result is finite.

        Args:
            identity: of the gradient.
            given: the tensor that elements were chosen from, which may be overwritten.
            choice: of its elements.
            own: these elements as the others have decoded them from this rank's codes; None: their
                rounding is not made up for.
            mean: their mean over the ranks; in a permutation the whole result.
        """

    def owe(self, identity: int, given: Tensor, choice: Chosen, owing: Tensor) -> None:
        """Takes over what this rank owes of the mean of the chosen elements, in place of what it
        owed; after ``learn``."""
        choice.add(owing, choice.left(self.memory.zeros("owed", identity, given)))


class Residual(Feedback):
    """The part not sent is added to the next gradient; rounding, unless it is biased, is not part
    of it."""

    estimates = False

    def __init__(self, memory: Memory, options: Options) -> None:
        super().__init__(memory, options)
        self._beta = options.low_pass

    def given(self, identity: int, x: Tensor, take: Take) -> Tensor:
        """See :class:`Feedback`."""
        total = take(x.numel(), Memory.dtype(x.dtype), x.device)
        residual = self.memory.get("residual", identity, total)
        if residual is None:
            return total.copy_(x.view(-1))
        return torch.add(residual, x.view(-1), out=total)

    def learn(
        self, identity: int, given: Tensor, choice: Chosen, own: Tensor | None, mean: Tensor
    ) -> None:
        """See :class:`Feedback`."""
        if own is None:
            unsent = choice.left(given)
        else:
            choice.add(own.neg(), unsent := given)
        if self._beta < 1:
            before = self.memory.get("residual", identity, given)
            if before is None:
                unsent.mul_(self._beta)
            else:
                unsent = torch.lerp(before, unsent, self._beta)
        self.memory.set("residual", identity, unsent)


class Estimates(Feedback):
    """Estimates of the gradient of this rank and of the mean, as in EF21."""

    estimates = True
    subtracted: ClassVar[str] = "own"
    """The kind of tensor that is subtracted from the gradient."""

    def given(self, identity: int, x: Tensor, take: Take) -> Tensor:
        """See :class:`Feedback`."""
        total = take(x.numel(), Memory.dtype(x.dtype), x.device).copy_(x.view(-1))
        before = self.memory.get(self.subtracted, identity, total)
        return total if before is None else total.sub_(before)

    def learn(
        self, identity: int, given: Tensor, choice: Chosen, own: Tensor | None, mean: Tensor
    ) -> None:
        """See :class:`Feedback`."""
        assert own is not None
        choice.add(own, self.memory.zeros("own", identity, given))
        self._add(choice, mean, self.memory.zeros("mean", identity, given))
        self.memory.extend(identity, mean)

    def _add(self, choice: Chosen, mean: Tensor, to: Tensor) -> None:
        """Adds the mean of what was exchanged to its estimate."""
        choice.add(mean, to)

    def result(self, identity: int, like: Tensor) -> Tensor:
        """The estimate of the mean."""
        return self.memory.zeros("mean", identity, like)


class Differences(Estimates):
    """Estimates that the differences between successive gradients are added to, as in MARINA.

    In place of the gradient of the step before stands that of the last step whose result is finite,
    which the estimates are of.
    """

    subtracted = "previous"

    def __init__(self, memory: Memory, options: Options) -> None:
        super().__init__(memory, options)
        self._disjoint = options.disjoint

    def learn(
        self, identity: int, given: Tensor, choice: Chosen, own: Tensor | None, mean: Tensor
    ) -> None:
        """See :class:`Feedback`."""
        previous = self.memory.zeros("previous", identity, given)
        before = self.memory.get(self.subtracted, identity, given)
        if before is None:
            previous.copy_(given)
        else:
            torch.add(before, given, out=previous)
        super().learn(identity, given, choice, own, mean)

    def _add(self, choice: Chosen, mean: Tensor, to: Tensor) -> None:
        if self._disjoint:
            to.add_(mean)
        else:
            super()._add(choice, mean, to)


class WholeDifferences(Differences):
    """The step of MARINA in which all elements are exchanged: those of the difference between the
    gradient and its estimate."""

    subtracted = "own"


class Controlled(Estimates):
    """Estimates and a residual, as in EControl.

    The share of the residual is a sixth of the contraction, which is what those of the paper's
    theorems come to where few elements are sent. With a whole one, residuals of elements that are
    not sent for 2 / keep steps grow. Lanes of 2 bits contract less: with a sixth, and what is owed
    as part of the residual, estimates of a gradient that stays the same go astray.
    """

    def __init__(self, memory: Memory, options: Options) -> None:
        super().__init__(memory, options)
        self._share = options.keep / (24 if options.least_bits == 2 else 6)

    def given(self, identity: int, x: Tensor, take: Take) -> Tensor:
        """See :class:`Feedback`."""
        away = super().given(identity, x, take)
        residual = self.memory.get("residual", identity, away)
        return away if residual is None else away.add_(residual, alpha=self._share)

    def learn(
        self, identity: int, given: Tensor, choice: Chosen, own: Tensor | None, mean: Tensor
    ) -> None:
        """See :class:`Feedback`."""
        assert own is not None
        # e + g - h', where g - h is what was given but for its share of e.
        residual = self.memory.zeros("residual", identity, given)
        choice.add(own.neg(), residual.mul_(1 - self._share).add_(given))
        super().learn(identity, given, choice, own, mean)

    def owe(self, identity: int, given: Tensor, choice: Chosen, owing: Tensor) -> None:
        """See :class:`Feedback`. The result lacks all that is owed, in this step: so the mean of
        the residuals gets it, from the rank that owes it."""
        super().owe(identity, given, choice, owing)
        owed = self.memory.zeros("owed", identity, given)
        self.memory.zeros("residual", identity, given).add_(owed, alpha=self.memory.size)


CLASSES: dict[str, type[Feedback]] = {
    "residual": Residual, "ef21": Estimates, "econtrol": Controlled, "marina": Differences,
}  # fmt: skip
"""The class for each value of the option ``error_feedback``."""


def feedback_of(options: Options, memory: Memory) -> Feedback | None:
    """The error feedback that the options ask for; None: there is none."""
    kind = options.error_feedback
    return None if kind is None else CLASSES[kind](memory, options)
