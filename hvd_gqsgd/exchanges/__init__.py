"""The two ways in which codes become means that all ranks have."""

from __future__ import annotations

from hvd_gqsgd.buffers import BufferPool
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.base import ORDER, Exchange
from hvd_gqsgd.exchanges.two_phase import TwoPhaseExchange
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports import Transport

__all__ = ["ORDER", "Exchange", "make_exchange"]

KINDS = {"allreduce": AllreduceExchange, "two_phase": TwoPhaseExchange}


def make_exchange(
    options: Options, transport: Transport, pool: BufferPool, stats: Stats
) -> Exchange:
    """The exchange that the options ask for among this many ranks.

    Raises:
        ValueError: they leave no levels to this many ranks.
    """
    return KINDS[options.exchange_for(transport.size)](options, transport, pool, stats)
