"""The tensors that a rank keeps between steps for error feedback."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd.checks import check_int
from hvd_gqsgd.option_types import ErrorFeedback
from hvd_gqsgd.options import digest

__all__ = ["KINDS", "Memory"]

_log = logging.getLogger("hvd_gqsgd")

KINDS: dict[ErrorFeedback | None, tuple[str, ...]] = {
    None: (),
    "residual": ("residual", "owed"),
    "ef21": ("own", "mean", "owed"),
    "econtrol": ("residual", "own", "mean", "owed"),
    "marina": ("previous", "own", "mean"),
}
"""The tensors of a gradient, by the option ``error_feedback``.

- ``residual``: the part not sent yet.
- ``previous``: the gradient of the step before.
- ``own``: the estimate of this rank's gradient.
- ``mean``: the estimate of the mean, which all ranks have from the codes exchanged.
- ``owed``: the part of the means that this rank has rounded off and owes, with error feedback of
  the rounding in two phases; none otherwise.
"""


class Memory:
    """Flat tensors by kind and by the identity of their gradient; float32, or float64 for such
    gradients.

    Args:
        feedback: the option ``error_feedback``.
    """

    def __init__(self, feedback: ErrorFeedback | None = None) -> None:
        self._of: dict[str, dict[int, Tensor]] = {kind: {} for kind in KINDS[feedback]}
        self._turns: dict[int, int] = {}
        self._history: dict[int, int] = {}
        self._rank = self._size = 0
        self._loaded = False  # and not used yet, by the rank that they are of
        self._apart: set[int] = set()

    @property
    def size(self) -> int:
        """Ranks of the step that has begun."""
        return self._size

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
            self._history.clear()
        if self._size != size:
            self._history.clear()
        self._rank, self._size, self._loaded = rank, size, False

    def get(self, kind: str, identity: int, like: Tensor) -> Tensor | None:
        """The tensor of a gradient, on the device of ``like``, which has as many elements; None:
        there is none yet, which counts as zeros.

        Raises:
            ValueError: a tensor of another length was loaded.
        """
        found = self._of[kind].get(identity)
        if found is None:
            return None
        if found.numel() != like.numel():
            raise ValueError(
                f"the loaded state has {found.numel()} elements for a gradient of {like.numel()}: "
                "load a state of the same model"
            )
        if found.device != like.device:
            found = self._of[kind][identity] = found.to(like.device)
        return found

    def zeros(self, kind: str, identity: int, like: Tensor) -> Tensor:
        """The same, but zeros that are kept if there is none yet."""
        found = self.get(kind, identity, like)
        if found is None:
            found = self._of[kind][identity] = torch.zeros_like(like)
        return found

    def set(self, kind: str, identity: int, x: Tensor) -> None:
        """Replaces the tensor of a gradient."""
        self._of[kind][identity] = x

    def turn(self, identity: int) -> int:
        """How many exchanges of a gradient have begun, as far as this rank knows."""
        return self._turns.get(identity, 0)

    def begin_turn(self, identity: int, turn: int) -> None:
        """Counts the exchange that comes after ``turn`` others."""
        self._turns[identity] = turn + 1

    def history(self, identities: Iterable[int]) -> int:
        """A number of 62 bits for all exchanges that have changed the estimates of these
        gradients: the same on ranks whose estimates belong together. 0: there are none, or the
        number of ranks has changed."""
        return sum(self._history.get(identity, 0) for identity in identities) % 2**62

    def set_apart(self, identities: Iterable[int], apart: bool) -> None:
        """Tells whether the ranks compare the history of these gradients bucket by bucket, or with
        that of all others of a step."""
        if apart:
            self._apart.update(identities)
        else:
            self._apart.difference_update(identities)

    def together(self) -> frozenset[int]:
        """The gradients with a history that are not set apart."""
        return frozenset(self._history) - self._apart

    def with_history(self, identities: Iterable[int]) -> frozenset[int]:
        """Those of these gradients that have a history."""
        # One by one: another pipeline's thread may add gradients in the meantime.
        return frozenset(identity for identity in identities if identity in self._history)

    def has_estimates(self, identities: Iterable[int]) -> bool:
        """Whether these gradients have a history, and all tensors but residuals."""
        kept = [tensors for kind, tensors in self._of.items() if kind != "residual"]
        return all(
            identity in self._history and all(identity in tensors for tensors in kept)
            for identity in identities
        )

    def extend(self, identity: int, mean: Tensor) -> None:
        """Adds an exchange, with the mean that all ranks have, to the history of a gradient."""
        bits = mean.view(torch.int64 if mean.element_size() == 8 else torch.int32)
        before, now = self._history.get(identity, 0), int(bits.sum(dtype=torch.int64))
        # Two digests of 31 bits; never 0.
        high, low = digest(("exchange", before, now)), digest(("change", before, now))
        self._history[identity] = (high << 31 | low) or 1

    def forget_estimates(self, identities: Iterable[int]) -> None:
        """Drops the estimates of some gradients, which begin with zeros again; residuals stay."""
        for identity in identities:
            self._history.pop(identity, None)
            for kind, tensors in self._of.items():
                if kind != "residual":
                    tensors.pop(identity, None)

    def drop_non_finite(self, identity: int) -> None:
        """Drops all that is kept of a gradient if NaN or infinity is in it, which would be in every
        result to come. Without the history, all ranks begin with estimates of zero."""
        kept = [tensors[identity] for tensors in self._of.values() if identity in tensors]
        if not all(bool(x.isfinite().all()) for x in kept):
            self._history.pop(identity, None)
            for tensors in self._of.values():
                tensors.pop(identity, None)

    def forget_owed(self) -> None:
        """Empties what this rank owes, for an exchange in which ranks owe nothing: its residuals
        take it over, and estimates that it is a part of begin with zeros.

        Raises:
            ValueError: tensors of different lengths were loaded for one gradient.
        """
        owed = self._of.get("owed")
        if not owed:
            return
        if "own" not in self._of:
            with torch.inference_mode(False), torch.no_grad():
                for identity, x in owed.items():
                    # The mean of the ranks' residuals gets what this rank alone owes.
                    self.zeros("residual", identity, x).add_(x, alpha=self._size)
        owed.clear()
        self._history.clear()

    def __bool__(self) -> bool:
        """Whether there was a step with error feedback."""
        return bool(self._turns) or any(self._of.values())

    def state_dict(self) -> dict[str, Any]:
        """The rank, the number of ranks, the turns and histories, and copies of the tensors."""
        return {
            "rank": self._rank,
            "size": self._size,
            "turns": dict(self._turns),
            "history": dict(self._history),
            "tensors": {
                kind: {key: x.clone() for key, x in tensors.items()}
                for kind, tensors in self._of.items()
            },
        }

    @staticmethod
    def check_state(state: Any) -> None:
        """Checks a state for ``load_state_dict``.

        Raises:
            TypeError, ValueError: it is not a result of ``state_dict``.
        """
        names = ("rank", "size", "turns", "history", "tensors")
        if not isinstance(state, dict) or state.keys() != set(names):
            raise ValueError(f"memory must have the keys {names}, got {state!r}")
        for name in ("rank", "size"):
            check_int(name, state[name], 0, 2**31 - 1)
        for name in ("turns", "history"):
            numbers = state[name]
            if not isinstance(numbers, dict):
                raise TypeError(f"memory must have a dict of int as {name!r}, got {numbers!r}")
            for key, number in numbers.items():
                check_int(f"a gradient in {name!r} of memory", key, 0, 2**31 - 1)
                check_int(f"a number in {name!r} of memory", number, 0, 2**62)
        tensors = state["tensors"]
        if not isinstance(tensors, dict) or not all(
            isinstance(of_kind, dict) and all(map(_is_kept, of_kind, of_kind.values()))
            for of_kind in tensors.values()
        ):
            raise TypeError(
                f"memory must have dense float tensors by kind and int, got {tensors!r}"
            )

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Takes over a state, or none; another rank's is dropped by the next step, and tensors that
        this error feedback does not keep at once."""
        for tensors in self._of.values():
            tensors.clear()
        self._turns, self._history = {}, {}
        self._apart.clear()
        self._rank, self._size, self._loaded = 0, 0, False
        if state is None:
            return
        others = [kind for kind, kept in state["tensors"].items() if kept and kind not in self._of]
        if others:
            kinds = {"residuals" if kind == "residual" else "estimates" for kind in others}
            _log.warning(
                "the %s of the loaded state are dropped: the state is that of another "
                "error_feedback than this compressor's",
                " and ".join(sorted(kinds)),
            )
        for kind, kept in self._of.items():
            for key, x in state["tensors"].get(kind, {}).items():
                kept[key] = x.clone().reshape(-1)
        if others and "owed" in self._of:  # a part of the dropped tensors
            self._of["owed"].clear()
        self._turns = dict(state["turns"])
        self._history = {} if others else dict(state["history"])
        self._rank, self._size, self._loaded = state["rank"], state["size"], True


def _is_kept(key: object, x: object) -> bool:
    return (
        isinstance(key, int)
        and isinstance(x, Tensor)
        and x.dtype.is_floating_point
        and x.layout == torch.strided
    )
