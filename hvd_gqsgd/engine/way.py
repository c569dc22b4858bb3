"""The exchange of buckets and the agreement on them, among the ranks that there are now."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from hvd_gqsgd.engine.agreement import Agreement, AgreementProtocol
from hvd_gqsgd.exchanges import Exchange, Setup, make_exchange
from hvd_gqsgd.exchanges.base import Take
from hvd_gqsgd.options import Options
from hvd_gqsgd.selections.memory import Memory
from hvd_gqsgd.transports.base import Transport

__all__ = ["Way"]


class Way(NamedTuple):
    """An exchange, the agreement that goes with it, and the collectives of both."""

    exchange: Exchange
    protocol: AgreementProtocol
    messages: tuple[str, ...]
    """The last parts of their names, in their order."""

    @property
    def branches(self) -> bool:
        """Whether a rank that gives up a step must know the result of a first message."""
        return self.protocol.may_give_up and self.exchange.branches

    def count(self, all_here: bool) -> int:
        """Collectives of a bucket; ``all_here``: that of ``Terms``."""
        return len(self.messages) if all_here else self.exchange.count_of_remaining

    @classmethod
    def of(
        cls, options: Options, transport: Transport, protocol: type[AgreementProtocol], take: Take,
        settle: Callable[[Agreement], None], memory: Memory,
    ) -> Way:  # fmt: skip
        """The way of options over a transport.

        Args:
            options: the same on all ranks.
            transport: moves the messages.
            protocol: how ranks agree.
            take: the source of memory for messages.
            settle: called with each agreement.
            memory: of this rank, for error feedback.

        Raises:
            ValueError: the options leave no levels to this many ranks.
        """
        setup = Setup(
            options, transport, take, protocol.header_in_norms,
            # Over NCCL the host looks at no message.
            protocol.may_give_up or transport.nccl is None, memory,
        )  # fmt: skip
        exchange = make_exchange(setup)
        agreement = protocol(options, exchange, transport, settle)
        return cls(exchange, agreement, (*protocol.messages, *exchange.messages))
