"""What an exchange is: stages of one collective each, the first of which brings the agreement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_gqsgd.codecs import Codec, make_codec
from hvd_gqsgd.engine.buckets import AGREEMENT, Agreement, Bucket, Item
from hvd_gqsgd.engine.buffer_pool import BufferPool
from hvd_gqsgd.engine.streams import on
from hvd_gqsgd.errors import AgreementError, RankLeftError
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.base import Handle, Transport

__all__ = ["ORDER", "Exchange", "Stage"]

ORDER = (
    "without named_parameters tensors are told apart by their order of arrival, so pass "
    "GlobalQSGD(named_parameters=model.named_parameters()) if that may differ between ranks"
)

ALIKE = "shapes, types, and whether the mean or the sum is asked for must be the same on all ranks"

# Squares are summed in 64 bits, in the units of native/core/l2.h.
MOST_SQUARES = 2**33


class Stage(NamedTuple):
    """One collective of a bucket's exchange."""

    message: str
    fill: Callable[[Bucket], None]
    """Makes what is sent of what came before."""
    send: Callable[[Bucket, str], Handle]
    """Starts it; without ``fill`` with whatever is in memory, by a rank that has given up."""
    read: Callable[[Bucket, Tensor], None]
    """Takes the result."""


class Exchange(ABC):
    """The way of buckets from their norms to what every rank can decode.

    Args:
        ahead: what ranks must agree on goes ahead of all else, in a message whose length does not
            depend on options or tensors; for transports that cannot tell ranks that their messages
            do not match. Otherwise it goes with the norms.

    Raises:
        ValueError: the options leave no levels to this many ranks.
    """

    def __init__(
        self,
        options: Options,
        transport: Transport,
        pool: BufferPool,
        stats: Stats,
        ahead: bool = False,
    ) -> None:
        self.options = options
        self.rank, self.size = transport.rank, transport.size
        # By name too, as one host may lack a native part that another one has.
        names = type(self).__name__, type(transport).__name__
        self._digest = digest((options.digest(), *names))
        self._ahead = ahead
        self._transport = transport
        self._pool = pool
        self._stats = stats
        self._wanted = Agreement(0, 0, ())
        self.codec = self.codec_for(options.most_bits)  # for the check; a step may take fewer
        self._norm_header = 0 if ahead else AGREEMENT
        self._advice = ALIKE if ahead else ORDER
        self.stages: list[Stage] = []
        if ahead:
            self.stages.append(Stage("header", self._fill_header, self._max_header, self._agree))
        self.stages += self.payload_stages()

    needs_all_ranks = False
    """Whether a rank that has left by ``hvd.join()`` would be missing."""

    @property
    def code_header(self) -> int:
        """Words before the codes; zero as long as the rank has not taken part."""
        return 0

    @property
    @abstractmethod
    def summands(self) -> int:
        """How many codes a lane must hold the sum of."""

    def payload_stages(self) -> Sequence[Stage]:
        """What follows the agreement, or begins with it; the last one sets
        ``bucket.contribution``."""
        stages = [Stage("norms", self._fill_norms, self._max_norms, self._read_norms)]
        if self.options.norm == "l2":
            stages.append(
                Stage("squares", self._fill_squares, self._sum_squares, self._read_squares)
            )
        return [*stages, *self.code_stages()]

    @abstractmethod
    def code_stages(self) -> Sequence[Stage]:
        """What follows the norms; the last one sets ``bucket.contribution``."""

    @abstractmethod
    def decode(self, bucket: Bucket, item: Item, out: Tensor, scale: float) -> None:
        """Writes ``scale`` times the sum over the contributors to ``out``, flat."""

    def codec_for(self, bits: int) -> Codec:
        """The codec for lanes of this width.

        Raises:
            ValueError: they are too narrow.
        """
        return make_codec(
            self.options, bits, summands=self.summands, rank=self.rank, world_size=self.size
        )

    def check(self, numel: int) -> None:
        """Whether tensors of so many elements can be exchanged.

        Raises:
            ValueError: they cannot.
        """
        squares = min(self.codec.block(numel), numel) * self.size
        if self.options.norm == "l2" and squares > MOST_SQUARES:
            raise ValueError(
                f"norm='l2' takes blocks of at most {MOST_SQUARES // self.size} elements on "
                f"{self.size} ranks, got block_size={self.options.block_size} for {numel} elements"
            )

    def begin_step(self, wanted: Agreement) -> None:
        """What this rank proposes for the buckets of a step."""
        self._wanted = wanted
        if wanted.bits != self.codec.bits:
            self.codec = self.codec_for(wanted.bits)

    def launch(self, bucket: Bucket) -> None:
        """Takes this rank's norms of a bucket and starts its first collective."""
        bucket.codec = self.codec
        bucket.close()
        with on(bucket.stream):
            self._enter(bucket, 0)

    def advance(self, bucket: Bucket) -> None:
        """Reads the result of a collective that is done, and starts the next one if there is one.

        Raises:
            AgreementError: ranks disagree on the options or on the tensors of the bucket.
            Exception: whatever the transport raised.
        """
        assert bucket.handle is not None
        handle, bucket.handle = bucket.handle, None
        with on(bucket.stream):
            self.stages[bucket.stage].read(bucket, handle.wait())
            if bucket.contribution is None:
                self._enter(bucket, bucket.stage + 1)

    def start_rest(self, bucket: Bucket, last: int) -> list[Handle]:
        """Starts the collectives that a bucket has before it, up to the one numbered ``last``, with
        messages that tell the others that they mean nothing."""
        with on(bucket.stream):
            return [
                stage.send(bucket, f"{bucket.name}.{stage.message}")
                for stage in self.stages[bucket.stage + 1 : last + 1]
            ]

    def _enter(self, bucket: Bucket, number: int) -> None:
        stage = self.stages[number]
        stage.fill(bucket)
        bucket.stage = number  # before it is sent, as that may call back at once
        bucket.handle = stage.send(bucket, f"{bucket.name}.{stage.message}")

    def _take(self, bucket: Bucket, numel: int, dtype: torch.dtype) -> Tensor:
        return self._pool.take(numel, dtype, bucket.kind[1])

    def _count(self, nbytes: int) -> None:
        self._stats.compressed_bytes_on_wire += nbytes

    # --- the agreement, in a message of its own ---------------------------------------------------

    def _fill_header(self, bucket: Bucket) -> None:
        # Wherever the tensors are: the host must see what comes of it.
        bucket.header = torch.empty(AGREEMENT, dtype=torch.int64, device="cpu")
        bucket.write_agreement(self._digest, self._wanted)

    def _max_header(self, bucket: Bucket, name: str) -> Handle:
        assert bucket.header is not None
        self._count(bucket.header.nbytes)
        return self._transport.max_async(bucket.header, name)

    # --- norms: the largest magnitude of each block -----------------------------------------------

    def _fill_norms(self, bucket: Bucket) -> None:
        assert bucket.codec is not None
        numel = bucket.lay_out_norms(bucket.codec, self._norm_header)
        bucket.norms = self._take(bucket, numel, bucket.kind[0])
        if self._norm_header:
            bucket.header = bucket.norms[: self._norm_header]
            bucket.write_agreement(self._digest, self._wanted)
        for item in bucket.items:
            assert item.x is not None
            bucket.codec.norms(item.x, bucket.norms[item.norms])

    def _max_norms(self, bucket: Bucket, name: str) -> Handle:
        assert bucket.norms is not None
        self._count(bucket.norms.nbytes)
        return self._transport.max_async(bucket.norms, name)

    def _read_norms(self, bucket: Bucket, result: Tensor) -> None:
        bucket.norms = result
        if self._norm_header:
            self._agree(bucket, result[: self._norm_header])

    def _agree(self, bucket: Bucket, result: Tensor) -> None:
        bucket.header = result
        options_agree, tensors_agree, agreement = bucket.read_agreement()
        if not options_agree:
            raise AgreementError(
                f"{bucket.name}: the ranks use different options; this rank has {self.options}, "
                f"and {type(self).__name__}"
            )
        if not tensors_agree:
            raise AgreementError(
                f"{bucket.name}: the ranks handed in different tensors, or in another order; "
                f"{self._advice}"
            )
        # The number of the next step travels in 32 bits too.
        numbers = (agreement.step, agreement.step + 1, *agreement.schedule)
        if min(numbers) < 0 or max(numbers) >= 2**31:
            raise AgreementError(
                f"{bucket.name}: a rank sent numbers that no rank has: {agreement}"
            )
        if not agreement.all_here and self.needs_all_ranks:
            raise RankLeftError(
                f"{bucket.name}: a rank has left by hvd.join(), and an exchange in two phases "
                "needs all of them; pass exchange='allreduce', with bits enough for it"
            )
        assert bucket.codec is not None
        if agreement.bits != bucket.codec.bits:
            least, most = self.options.least_bits, self.options.most_bits
            # The largest of all ranks' is no less than this one's, which is enough for all of them.
            if not bucket.codec.bits < agreement.bits <= most:
                raise AgreementError(
                    f"{bucket.name}: a rank asked for lanes of {agreement.bits} bits; the options "
                    f"say from {least} to {most}"
                )
            bucket.codec = self.codec_for(agreement.bits)
        bucket.agreement = agreement

    # --- squares: from largest magnitudes to L2 norms ---------------------------------------------

    def _fill_squares(self, bucket: Bucket) -> None:
        assert bucket.codec is not None and bucket.norms is not None
        squares = self._squares(bucket)
        for item in bucket.items:
            assert item.x is not None
            bucket.codec.squares(item.x, bucket.norms[item.norms], squares[item.norms])

    def _sum_squares(self, bucket: Bucket, name: str) -> Handle:
        squares = self._squares(bucket)[bucket.items[0].norms.start :]
        self._count(squares.nbytes)
        return self._transport.sum_async(squares, name)

    def _read_squares(self, bucket: Bucket, result: Tensor) -> None:
        assert bucket.codec is not None and bucket.norms is not None
        bucket.codec.l2_norms(bucket.norms[bucket.items[0].norms.start :], result)
        bucket.squares = None

    def _squares(self, bucket: Bucket) -> Tensor:
        """A sum of squares for each norm, at the same place; memory for the header goes unused."""
        if bucket.squares is None:
            bucket.squares = self._take(bucket, bucket.items[-1].norms.stop, torch.int64)
        return bucket.squares

    # --- codes: of all tensors, one behind the other ----------------------------------------------

    def _fill_codes(self, bucket: Bucket) -> None:
        assert bucket.codec is not None and bucket.norms is not None
        assert bucket.agreement is not None
        words = self._words(bucket)
        for item in bucket.items:
            assert item.x is not None
            bucket.codec.encode(
                item.x, bucket.norms[item.norms], words[item.words],
                bucket.agreement.step, item.identity,
            )  # fmt: skip

    def _words(self, bucket: Bucket) -> Tensor:
        assert bucket.codec is not None
        if bucket.words is None:
            numel = bucket.lay_out_words(bucket.codec, self.code_header)
            bucket.words = self._take(bucket, numel, bucket.codec.word_dtype)
            bucket.words[: self.code_header] = 0
        return bucket.words
