"""What can go wrong between ranks."""

from __future__ import annotations

__all__ = ["AgreementError"]


class AgreementError(RuntimeError):
    """The ranks did not ask for the same thing, so there is no right answer to give.

    Raised on every rank that takes part, from the reduced values that all of them see: other
    options or other tensors on another rank, another order of tensors, or a reduction that is not
    linear. No gradient is returned.
    """
