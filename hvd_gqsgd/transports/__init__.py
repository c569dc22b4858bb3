"""What the pipeline needs of whatever moves the bytes. Transports know no codec."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Handle", "Transport"]


class Handle(Protocol):
    """An operation in flight. Its tensor must not be touched until ``wait`` has returned."""

    def done(self) -> bool:
        """Whether ``wait`` would return, or raise, at once."""

    def wait(self) -> None:
        """Returns once the tensor holds the reduced values.

        Raises:
            AgreementError: the ranks' tensors do not match.
            Exception: whatever the library below raises when the exchange fails.
        """


class Transport(Protocol):
    """Collectives on integer tensors, in place, matched between ranks by name.

    A name is free again as soon as its operation has been waited for.
    """

    @property
    def rank(self) -> int:
        """This rank, from 0 to ``size`` - 1."""

    @property
    def size(self) -> int:
        """How many ranks take part."""

    @property
    def session(self) -> object:
        """Another object once the transport was shut down and started anew.

        Handles from an earlier session must not be used any more.
        """

    @property
    def turn_bytes(self) -> int:
        """What ``pass_turn`` sends."""

    def max_async(self, tensor: Tensor, name: str) -> Handle:
        """Starts an elementwise maximum over all ranks of an int32 or int64 tensor."""

    def sum_async(self, tensor: Tensor, name: str) -> Handle:
        """Starts an elementwise sum over all ranks of an int32 or int64 tensor."""

    def pass_turn(self, name: str) -> Handle:
        """Called where a sum could have been started and was not, as often on all ranks.

        For transports that count operations; others return a handle that is done.
        """

    def idle(self) -> None:
        """Called again and again while there is nothing to do but wait; sleeps for a moment."""
