"""The tensors that a rank keeps between steps for error feedback."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd.checks import check_int

__all__ = ["KINDS", "Memory"]

_log = logging.getLogger("hvd_gqsgd")

KINDS = ("residual", "own", "mean")
"""The tensors that there may be of a gradient: the part not sent yet; the estimate of this rank's
gradient, and that of the mean, which all ranks have from the codes that were exchanged."""


class Memory:
    """Flat tensors by kind and by the identity of their gradient; float32, or float64 for such
    gradients."""

    def __init__(self) -> None:
        self._of: dict[str, dict[int, Tensor]] = {kind: {} for kind in KINDS}
        self._steps: dict[int, int] = {}
        self._rank = self._size = 0
        self._loaded = False  # and not used yet, by the rank that they are of

    @staticmethod
    def dtype(of: torch.dtype) -> torch.dtype:
        """Type of the tensors for gradients of this type."""
        return torch.float64 if of == torch.float64 else torch.float32

    def begin(self, rank: int, size: int) -> None:
        """Begins a step of rank ``rank`` among ``size``; drops the tensors of another rank."""
        if self._loaded and self._rank != rank:
            _log.warning(
                "rank %d drops the residuals and estimates that it has loaded, as they are those "
                "of rank %d: save and load the state_dict() of each rank to keep them",
                rank, self._rank,
            )  # fmt: skip
            for tensors in self._of.values():
                tensors.clear()
            self._steps.clear()
        if self._size != size:
            self._steps.clear()
        self._rank, self._size, self._loaded = rank, size, False

    def get(self, kind: str, identity: int) -> Tensor | None:
        """The tensor of a gradient; None: there is none yet, which counts as zeros."""
        return self._of[kind].get(identity)

    def zeros(self, kind: str, identity: int, like: Tensor) -> Tensor:
        """The tensor of a gradient on the device of ``like``; zeros if there is none yet."""
        found = self._of[kind].get(identity)
        if found is None or found.device != like.device:
            found = torch.zeros_like(like) if found is None else found.to(like.device)
            self._of[kind][identity] = found
        return found

    def set(self, kind: str, identity: int, x: Tensor) -> None:
        """Replaces the tensor of a gradient."""
        self._of[kind][identity] = x

    def count_step(self, identity: int) -> None:
        """Counts a step that has changed the estimates of a gradient."""
        self._steps[identity] = self._steps.get(identity, 0) + 1

    def steps(self, identities: Iterable[int]) -> int:
        """The steps that have changed the estimates of these gradients, added up. Ranks whose
        estimates belong together have the same number; 0 where the number of ranks has changed."""
        return sum(self._steps.get(identity, 0) for identity in identities)

    def forget_estimates(self, identities: Iterable[int]) -> None:
        """Drops the estimates of some gradients, which begin with zeros again; residuals stay."""
        for identity in identities:
            self._steps.pop(identity, None)
            for kind in ("own", "mean"):
                self._of[kind].pop(identity, None)

    def __len__(self) -> int:
        """How many tensors there are."""
        return sum(map(len, self._of.values()))

    def state_dict(self) -> dict[str, Any]:
        """The rank, the number of ranks, the counted steps, and copies of the tensors."""
        return {
            "rank": self._rank,
            "size": self._size,
            "steps": dict(self._steps),
            "tensors": {
                kind: {key: x.clone() for key, x in tensors.items()}
                for kind, tensors in self._of.items() if tensors
            },
        }  # fmt: skip

    @staticmethod
    def check_state(state: Any) -> None:
        """Checks a state for ``load_state_dict``.

        Raises:
            TypeError, ValueError: it is not a result of ``state_dict``.
        """
        if not isinstance(state, dict) or state.keys() != {"rank", "size", "steps", "tensors"}:
            raise ValueError(
                f"memory must have the keys 'rank', 'size', 'steps' and 'tensors', got {state!r}"
            )
        for name in ("rank", "size"):
            check_int(name, state[name], 0, 2**31 - 1)
        steps, tensors = state["steps"], state["tensors"]
        if not isinstance(steps, dict) or not all(
            isinstance(number, int) for pair in steps.items() for number in pair
        ):
            raise TypeError(f"memory must count steps by int, got {steps!r}")
        if not isinstance(tensors, dict) or not all(
            kind in KINDS and isinstance(of_kind, dict) and all(
                isinstance(key, int) and isinstance(x, Tensor) and x.dtype.is_floating_point
                for key, x in of_kind.items()
            )
            for kind, of_kind in tensors.items()
        ):  # fmt: skip
            raise TypeError(
                f"memory must have float tensors by int for kinds {KINDS}, got {tensors!r}"
            )

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Takes over a state, or none; another rank's is dropped by the next step."""
        fresh = Memory()
        if state:
            for kind, tensors in state["tensors"].items():
                fresh._of[kind] = {key: x.clone().view(-1) for key, x in tensors.items()}
            fresh._steps = dict(state["steps"])
            fresh._rank, fresh._size, fresh._loaded = state["rank"], state["size"], True
        self.__dict__ |= fresh.__dict__
