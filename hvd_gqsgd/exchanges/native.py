"""All in one native call over MPI: norms, codes in chunks that overlap, and the decoded result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hvd_gqsgd import mpi_ops
from hvd_gqsgd.buckets import Bucket, Item, everyone
from hvd_gqsgd.exchanges.base import Exchange, Stage
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports import Done, Transport

__all__ = ["NativeExchange"]


class NativeExchange(Exchange):
    """Linear codes, with the results of an Allreduce; or exponential ones in a Reduce_scatter with
    an operator of their own.

    It must be known beforehand what the sum is to be scaled by.
    """

    def __init__(self, options: Options, transport: Transport, *rest: Any) -> None:
        if transport.mpi_handle is None:
            raise ValueError(
                "exchange='reduce_scatter' is for hvd_gqsgd.allreduce on an mpi4py communicator, "
                "with hvd_gqsgd's native part for MPI; take exchange='two_phase' for all else"
            )
        super().__init__(options, transport, *rest)
        self._comm = transport.mpi_handle
        if options.dither == "exponential" and self.size > mpi_ops.most_ranks(self.codec.bits):
            raise ValueError(
                f"exchange='reduce_scatter' at bits={self.codec.bits} is for at most "
                f"{mpi_ops.most_ranks(self.codec.bits)} ranks, got {self.size}: take "
                "exchange='two_phase'"
            )

    @property
    def summands(self) -> int:
        """All ranks; exponential codes are rounded instead of becoming wider."""
        return self.size

    def payload_stages(self) -> Sequence[Stage]:
        """One call."""
        return self.code_stages()

    def code_stages(self) -> Sequence[Stage]:
        """The same."""
        return [Stage("native", lambda bucket: None, self._allreduce, self._read)]

    def decode(self, bucket: Bucket, item: Item, out: Tensor, scale: float) -> None:
        """It is decoded already."""
        assert out is item.out and scale == item.scale

    def _allreduce(self, bucket: Bucket, name: str) -> Done:
        codec, agreement = bucket.codec, bucket.agreement
        assert codec is not None and agreement is not None
        for item in bucket.items:
            assert item.x is not None and item.scale is not None
            if item.out is None:
                item.out = self._pool.take(item.numel, item.dtype, item.device)
            block = codec.block(item.numel)
            codes = codec.num_words(item.numel) * codec.word_dtype.itemsize
            if codec.levels == 0:
                codes = mpi_ops.combined_bytes(item.numel, block, codec.bits, self.size)
            self._count(codec.num_norms(item.numel) * bucket.kind[0].itemsize + codes)
            mpi_ops.allreduce(
                item.x, item.out, self._comm, block, codec.bits, codec.levels,
                codec.seed, agreement.step, item.identity, codec.correlated, item.scale,
                mpi_ops.CHUNK,
            )  # fmt: skip
        return Done()

    def _read(self, bucket: Bucket, result: Tensor) -> None:
        bucket.contribution = everyone(self.size)
