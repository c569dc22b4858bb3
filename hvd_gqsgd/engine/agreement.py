"""Short words between ranks, ahead of exchanges: do all have the same options, and do all come?"""

from __future__ import annotations

from torch import Tensor

from hvd_gqsgd.engine.buckets import digest_header, read_digest, refusal
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.base import Transport

__all__ = ["check", "refuse"]


def refuse(transport: Transport, name: str) -> None:
    """Tells the other ranks, who wait for this one's agreement of this name, not to."""
    _max(transport, refusal(), name)


def check(transport: Transport, options: Options, name: str) -> None:
    """That all ranks have the same options.

    Raises:
        AgreementError: they have not, or a rank has refused.
    """
    header = digest_header(options.digest())
    _max(transport, header, name)
    if not read_digest(header):
        raise AgreementError(f"the ranks use different options; this rank has {options}")


def _max(transport: Transport, header: Tensor, name: str) -> None:
    handle = transport.max_async(header, name)
    while not handle.done():
        transport.idle()
    handle.wait()
