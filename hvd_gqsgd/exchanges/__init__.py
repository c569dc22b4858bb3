"""The ways from gradients to a mean that is the same on all ranks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.schedules import budget_of, least_bits
from hvd_gqsgd.exchanges.allreduce import AllreduceExchange
from hvd_gqsgd.exchanges.alone import AloneExchange
from hvd_gqsgd.exchanges.base import Exchange, Setup, Terms
from hvd_gqsgd.exchanges.by_node import NodeExchange
from hvd_gqsgd.exchanges.differences import DifferencesExchange
from hvd_gqsgd.exchanges.gather import GatherExchange
from hvd_gqsgd.exchanges.native import MpiExchange, NcclExchange
from hvd_gqsgd.exchanges.one_phase import OnePhaseExchange
from hvd_gqsgd.exchanges.owing import OwingExchange
from hvd_gqsgd.exchanges.parts import PartsExchange
from hvd_gqsgd.exchanges.selected import SelectedExchange
from hvd_gqsgd.exchanges.two_phase import TwoPhaseExchange
from hvd_gqsgd.nodes import Nodes, nodes_of_sizes
from hvd_gqsgd.options import Options

__all__ = ["EXCHANGES", "Exchange", "Setup", "Terms", "by_node_rule", "make_exchange"]

_log = logging.getLogger("hvd_gqsgd")

EXCHANGES: dict[str, Callable[[Setup], Exchange]] = {
    "allreduce": AllreduceExchange,
    "two_phase": TwoPhaseExchange,
    "one_phase": OnePhaseExchange,
    "gather": GatherExchange,
    "reduce_scatter": MpiExchange,
}
"""The class for each value of ``Options.exchange_for``."""


def make_exchange(setup: Setup) -> Exchange:
    """The exchange that the options ask for among this many ranks.

    Rank 0 logs it, and warns of a budget that cannot be held.

    Raises:
        ValueError: the options leave no levels to this many ranks, or ask for an exchange that
            this transport does not have.
    """
    transport = setup.transport
    # Horovod counts operations. The one rank of a process set must start as many as other ranks do.
    if transport.size == 1 and not transport.ranks_may_leave:
        _say_once(logging.INFO, "one rank: nothing is exchanged, and nothing is rounded")
        return AloneExchange(setup)
    exchange: Exchange
    if setup.options.selected:
        marina = setup.options.error_feedback == "marina"
        exchange = (DifferencesExchange if marina else SelectedExchange)(setup, _flat)
    else:
        exchange = _by_node(setup) or _flat(setup)
    if transport.rank == 0:
        _describe(setup, exchange)
    return exchange


def _by_node(setup: Setup) -> NodeExchange | None:
    """The exchange by nodes, unless the flat one is asked for, or the better one."""
    options, size = setup.options, setup.transport.size
    hierarchy, nodes = options.hierarchy, setup.transport.nodes
    takes = by_node_rule(options, size)
    if takes is None:
        return None
    if isinstance(hierarchy, tuple):
        nodes = nodes_of_sizes(hierarchy, size)
    if nodes is not None and not takes(nodes):
        return None
    return NodeExchange(setup, lambda: _flat(setup._replace(header=0)), nodes, takes)


def by_node_rule(options: Options, size: int) -> Callable[[Nodes], bool] | None:
    """Whether given nodes of ``size`` ranks are exchanged between; None: no nodes are."""
    kind, hierarchy = options.exchange_for(size), options.hierarchy
    if hierarchy == "flat" or kind not in ("allreduce", "two_phase"):
        return None
    if hierarchy == "auto":
        return (lambda nodes: nodes.pays) if by_node_pays(kind) else None
    return lambda nodes: not nodes.flat


def by_node_pays(kind: str) -> bool:
    """Whether ``hierarchy="auto"`` replaces a kind of exchange: an Allreduce of codes may add up
    within nodes first, with as few bytes between them and fewer messages."""
    return kind == "two_phase"


def _flat(setup: Setup) -> Exchange:
    """The exchange without nodes."""
    options, transport = setup.options, setup.transport
    kind = options.exchange_for(transport.size)
    make = PartsExchange if options.disjoint else EXCHANGES[kind]
    if make is TwoPhaseExchange and setup.keeps_own:
        make = OwingExchange
    one_width = not isinstance(options.bits, BlockBits)
    if options.selected:  # native exchanges take whole gradients
        return make(setup)
    if kind == "allreduce" and transport.nccl is not None and one_width:
        make = NcclExchange
    elif (
        kind == "allreduce"
        and one_width
        and options.norm == "max"
        and transport.mpi_handle is not None
    ):
        make = MpiExchange
    return make(setup)


def _describe(setup: Setup, exchange: Exchange) -> None:
    """Logs an exchange."""
    options, size = setup.options, setup.transport.size
    _say_once(logging.INFO, f"{exchange.describe()}: {options}")
    budget, least = budget_of(options.width), least_bits(options.width, exchange.summands)
    if least > budget:
        _say_once(
            logging.WARNING,
            f"a budget of {budget:g} bits cannot be held: the sum over {size} ranks takes "
            f"lanes of {least:g} bits at the least",
        )


@functools.cache
def _say_once(level: int, message: str) -> None:
    _log.log(level, message)
