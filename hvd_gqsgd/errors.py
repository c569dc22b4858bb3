"""What can go wrong between ranks."""

from __future__ import annotations

__all__ = ["GAVE_UP", "REFUSED", "AgreementError"]

GAVE_UP = (
    "a rank has given up this step, as after an exception that it caught, so its gradients are "
    "missing; the step is lost for all ranks, and the next one can go on"
)

REFUSED = (
    "a rank could not take part in this exchange; that rank has an error of its own that says why"
)


class AgreementError(RuntimeError):
    """The ranks did not ask for the same thing, so there is no right answer to give.

    Raised on every rank that takes part, from the reduced values that all of them see: other
    options or other tensors on another rank, another order of tensors, or a reduction that is not
    linear. No gradient is returned.
    """
