"""Errors of an exchange that all ranks raise."""

from __future__ import annotations

__all__ = ["GAVE_UP", "REFUSED", "AgreementError"]

GAVE_UP = (
    "a rank abandoned this step, for example after it caught an exception, so its gradients are "
    "missing; the step is lost on all ranks, and training can continue with the next step"
)

REFUSED = "a rank could not take part in this exchange; see the error that this rank raised"


class AgreementError(RuntimeError):
    """The ranks disagree on an exchange, so no correct result exists.

    Raised on every participating rank if options, tensors or the order of tensors differ between
    ranks, or if the reduction is not linear. No gradient is returned, and the message has the first
    difference. Under DDP, ``backward()`` raises it as a ``RuntimeError`` with the same message.
    """
