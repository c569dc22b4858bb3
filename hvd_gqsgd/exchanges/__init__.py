"""The ways in which codes become means that all ranks have."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from hvd_gqsgd.codecs.bit_schedule import DynamicBits, Schedule, wire_bits
from hvd_gqsgd.engine.buffer_pool import BufferPool
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.base import ORDER, Exchange
from hvd_gqsgd.exchanges.native import MpiExchange, NcclExchange
from hvd_gqsgd.exchanges.two_phase import TwoPhaseExchange
from hvd_gqsgd.options import ENOUGH_LEVELS, Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Transport

__all__ = ["ORDER", "Exchange", "make_exchange"]

_log = logging.getLogger("hvd_gqsgd")

_KINDS: dict[str, Callable[..., Exchange]] = {
    "allreduce": AllreduceExchange,
    "two_phase": TwoPhaseExchange,
    "reduce_scatter": MpiExchange,
}


def make_exchange(
    options: Options,
    transport: Transport,
    pool: BufferPool,
    stats: Stats,
    ahead: bool = False,
) -> Exchange:
    """The exchange that the options ask for among this many ranks; see ``Exchange`` for ``ahead``.

    Rank 0 logs what a user may not expect of it.

    Raises:
        ValueError: they leave no levels to this many ranks, or ask for what this transport has not.
    """
    size, kind = transport.size, options.exchange_for(transport.size)
    make = _KINDS[kind]
    if kind == "allreduce" and transport.nccl is not None:
        make = NcclExchange
    elif kind == "allreduce" and options.norm == "max" and transport.mpi_handle is not None:
        make = MpiExchange
    exchange = make(options, transport, pool, stats, ahead)
    if transport.rank == 0:
        _say_once(logging.INFO, f"{kind} among {size} ranks: {options}")
        if kind == "two_phase" and (options.exchange, options.dither) == ("auto", "linear"):
            _say_once(
                logging.WARNING,
                f"bits={options.bits} leaves less than {ENOUGH_LEVELS} levels to the sum over "
                f"{size} ranks: exchange='auto' takes the two-phase exchange",
            )
        if isinstance(options.bits, DynamicBits):
            least = wire_bits(Schedule(options.bits).usable(exchange.summands)[0])
            if least > options.bits.budget:
                _say_once(
                    logging.WARNING,
                    f"a budget of {options.bits.budget:g} bits cannot be held: the sum over {size} "
                    f"ranks takes lanes of {least:g} bits at the least",
                )
    return exchange


@functools.cache
def _say_once(level: int, message: str) -> None:
    _log.log(level, message)
