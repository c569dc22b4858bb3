"""The residuals of a rank: the parts of its gradients that were not sent yet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd.checks import check_int

__all__ = ["Residuals"]

_log = logging.getLogger("hvd_gqsgd")


class Residuals:
    """A residual for each tensor, by its identity; float32, or float64 for such gradients."""

    def __init__(self) -> None:
        self._of: dict[int, Tensor] = {}
        self._rank = 0
        self._loaded = False  # and not used yet, by the rank that they are of

    @staticmethod
    def dtype(of: torch.dtype) -> torch.dtype:
        """Type of the residuals of gradients of this type."""
        return torch.float64 if of == torch.float64 else torch.float32

    def added(
        self, identity: int, x: Tensor, rank: int,
        take: Callable[[int, torch.dtype, torch.device], Tensor],
    ) -> Tensor:  # fmt: skip
        """The gradient ``x`` of this rank plus its residual, flat and in memory from ``take``."""
        if self._loaded and self._rank != rank:
            _log.warning(
                "rank %d drops the residuals that it has loaded, as they are those of rank %d: "
                "save and load the state_dict() of each rank to keep them", rank, self._rank,
            )  # fmt: skip
            self._of.clear()
        self._rank, self._loaded = rank, False
        residual = self._of.get(identity)
        total = take(x.numel(), self.dtype(x.dtype), x.device)
        if residual is None:
            return total.copy_(x.view(-1))
        return torch.add(residual.to(x.device), x.view(-1), out=total)

    def keep(self, identity: int, unsent: Tensor, beta: float) -> None:
        """Takes over what a step has not sent, with the low-pass filter of ScaleCom (arXiv
        2104.11125, equation 5): ``(1 - beta)`` times the residual plus ``beta`` times that."""
        if beta < 1:
            before = self._of.get(identity)
            unsent = unsent.mul_(beta) if before is None else torch.lerp(before, unsent, beta)
        self._of[identity] = unsent

    def __len__(self) -> int:
        """How many tensors have a residual."""
        return len(self._of)

    def state_dict(self) -> dict[str, Any]:
        """The rank, and its residuals, copied."""
        return {"rank": self._rank, "tensors": {key: x.clone() for key, x in self._of.items()}}

    @staticmethod
    def check_state(state: Any) -> None:
        """Checks a state for ``load_state_dict``.

        Raises:
            TypeError, ValueError: it is not a result of ``state_dict``.
        """
        if not isinstance(state, dict) or state.keys() != {"rank", "tensors"}:
            raise ValueError(f"residuals must have the keys 'rank' and 'tensors', got {state!r}")
        check_int("rank", state["rank"], 0, 2**31 - 1)
        tensors = state["tensors"]
        if not isinstance(tensors, dict) or not all(
            isinstance(key, int) and isinstance(x, Tensor) and x.dtype.is_floating_point
            for key, x in tensors.items()
        ):
            raise TypeError(f"residuals must be a dict of float tensors by int, got {tensors!r}")

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Takes over a state, or none; another rank's is dropped by the next step."""
        tensors = state["tensors"] if state else {}
        self._of = {key: x.clone().view(-1) for key, x in tensors.items()}
        self._rank, self._loaded = (state["rank"], True) if state else (0, False)
