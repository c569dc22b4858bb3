"""What transports for GPUs leave to the one that they stand on."""

from __future__ import annotations

from typing import ClassVar

from hvd_gqsgd.nodes import Nodes
from hvd_gqsgd.transports.base import Transport

__all__ = ["WrappedTransport"]


class WrappedTransport:
    """The ranks of another transport."""

    mpi_handle: ClassVar[None] = None

    def __init__(self, base: Transport) -> None:
        self._base = base

    @property
    def rank(self) -> int:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._base.rank

    @property
    def size(self) -> int:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._base.size

    @property
    def session(self) -> object:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._base.session

    @property
    def nodes(self) -> Nodes | None:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._base.nodes

    @property
    def ranks_may_leave(self) -> bool:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._base.ranks_may_leave

    @property
    def absences(self) -> int | None:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        return self._base.absences

    def idle(self, waited: float = 0.0) -> None:
        """See :class:`hvd_gqsgd.transports.base.Transport`."""
        self._base.idle(waited)
