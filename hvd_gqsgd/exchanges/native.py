"""All in one native call: norms, codes and the decoded result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd._native import mpi as native_mpi
from hvd_gqsgd.codecs import Codec, CodeKind
from hvd_gqsgd.engine.buckets import Bucket, Item, everyone
from hvd_gqsgd.exchanges.base import Exchange, Stage
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.base import Done, Transport

__all__ = ["MpiExchange", "NcclExchange"]


class NativeExchange(Exchange):
    """What it must know beforehand is what the sum is to be scaled by."""

    @property
    def summands(self) -> int:
        """All ranks; where codes are not summed, they are rounded instead of becoming wider."""
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

    @abstractmethod
    def _reduce(self, item: Item, out: Tensor, codec: Codec, step: int) -> int:
        """Exchanges a tensor; returns how many bytes an Allreduce had to move."""

    def _allreduce(self, bucket: Bucket, name: str) -> Done:
        assert bucket.codec is not None and bucket.agreement is not None
        for item in bucket.items:
            if item.out is None:
                item.out = self._pool.take(item.numel, item.dtype, item.device)
            self._count(self._reduce(item, item.out, bucket.codec, bucket.agreement.step))
        return Done()

    def _read(self, bucket: Bucket, result: Tensor) -> None:
        bucket.contribution = everyone(self.size)


class MpiExchange(NativeExchange):
    """Over MPI: linear codes in chunks that overlap, with the results of an Allreduce; or
    exponential ones in a Reduce_scatter with an operator of their own.
    """

    def __init__(self, options: Options, transport: Transport, *rest: Any) -> None:
        if transport.mpi_handle is None:
            raise ValueError(
                "exchange='reduce_scatter' is for hvd_gqsgd.allreduce on an mpi4py communicator, "
                "with hvd_gqsgd's native part for MPI; take exchange='two_phase' for all else"
            )
        super().__init__(options, transport, *rest)
        self._comm = transport.mpi_handle
        if options.dither == "exponential" and self.size > native_mpi.most_ranks(self.codec.bits):
            raise ValueError(
                f"exchange='reduce_scatter' at bits={self.codec.bits} is for at most "
                f"{native_mpi.most_ranks(self.codec.bits)} ranks, got {self.size}: take "
                "exchange='two_phase'"
            )

    def _reduce(self, item: Item, out: Tensor, codec: Codec, step: int) -> int:
        assert item.x is not None and item.scale is not None
        block = codec.block(item.numel)
        native_mpi.allreduce(
            item.x, out, self._comm, block, *codec.code,
            codec.seed, step, item.identity, codec.correlated, item.scale, native_mpi.CHUNK,
        )  # fmt: skip
        if codec.kind is CodeKind.EXPONENTIAL:
            codes = native_mpi.combined_bytes(item.numel, block, codec.bits, self.size)
        else:
            codes = codec.num_words(item.numel) * codec.word_dtype.itemsize
        return codec.num_norms(item.numel) * codec.norm_dtype(item.dtype).itemsize + codes


class NcclExchange(NativeExchange):
    """Over NCCL: all is enqueued on one stream, and the host waits for nothing. Linear codes."""

    def _reduce(self, item: Item, out: Tensor, codec: Codec, step: int) -> int:
        assert item.x is not None and item.scale is not None and self._transport.nccl is not None
        take, device = self._pool.take, item.device
        norms = take(codec.num_norms(item.numel), codec.norm_dtype(item.dtype), device)
        squares = None
        if self.options.norm == "l2":
            squares = take(norms.numel(), torch.int64, device)
        words = take(codec.num_words(item.numel), codec.word_dtype, device)
        self._transport.nccl.connect().allreduce(
            item.x, out, norms, squares, words, codec.block(item.numel), *codec.code,
            codec.seed, step, item.identity, codec.correlated, item.scale,
        )  # fmt: skip
        return norms.nbytes + words.nbytes + (squares.nbytes if squares is not None else 0)
