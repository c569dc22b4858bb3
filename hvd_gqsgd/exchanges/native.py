"""Exchanges in one native call: norms, codes and the decoded result."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvd_gqsgd._native import mpi as native_mpi
from hvd_gqsgd.bucket import Bucket, Item
from hvd_gqsgd.codecs import Codec, CodeKind
from hvd_gqsgd.exchanges.base import Exchange, Running, Setup, Terms
from hvd_gqsgd.exchanges.collectives import NativeCall
from hvd_gqsgd.exchanges.contribution import Contribution, everyone

__all__ = ["MpiExchange", "NcclExchange"]


class NativeExchange(Exchange):
    """An exchange whose scale must be known beforehand, and of ranks that have agreed ahead."""

    messages = ("native",)

    @property
    def summands(self) -> int:
        """All ranks; codes that are not summed are rounded instead of becoming wider."""
        return self.size

    def run(self, bucket: Bucket, terms: Terms) -> Running:
        """See :class:`Exchange`."""
        with terms.attempt():
            for item in bucket.items:
                if item.out is None:
                    item.out = self._take(item.numel, item.dtype, item.device).view(item.shape)

        # The step and the width are settled by the time of these calls.
        def call() -> None:
            for item in bucket.items:
                assert item.out is not None
                self._reduce(item, item.out, self.codec(terms.bits), terms.step)

        def moved() -> int:
            return sum(self._nbytes(item, self.codec(terms.bits)) for item in bucket.items)

        nothing = torch.empty(0, dtype=torch.int32, device="cpu")
        yield NativeCall("native", nothing, call, moved)
        return _Reduced(everyone(self.size))

    @abstractmethod
    def _reduce(self, item: Item, out: Tensor, codec: Codec, step: int) -> None:
        """Exchanges a tensor."""

    def _nbytes(self, item: Item, codec: Codec) -> int:
        """Bytes that an Allreduce has to move for a tensor."""
        norms = codec.num_norms(item.numel) * codec.norm_dtype(item.dtype).itemsize
        return norms + codec.num_words(item.numel) * codec.word_dtype.itemsize


@dataclass(frozen=True)
class _Reduced:
    contribution: Contribution

    def decode(self, items: Sequence[Item], outs: Sequence[Tensor], scale: float) -> None:
        """The native call has decoded the result."""
        assert all(out is item.out for item, out in zip(items, outs, strict=True))
        assert all(scale == item.scale for item in items)


class MpiExchange(NativeExchange):
    """Over MPI: linear codes in chunks that overlap, with the results of an Allreduce; or
    exponential ones in a Reduce_scatter with an operator of their own.
    """

    def __init__(self, setup: Setup) -> None:
        if setup.transport.mpi_handle is None:
            raise ValueError(
                "exchange='reduce_scatter' is for hvd_gqsgd.allreduce on an mpi4py communicator, "
                "with hvd_gqsgd's native part for MPI; take exchange='two_phase' for all else"
            )
        super().__init__(setup)
        self._comm = setup.transport.mpi_handle
        bits = setup.options.most_bits
        if setup.options.dither == "exponential" and self.size > native_mpi.most_ranks(bits):
            raise ValueError(
                f"exchange='reduce_scatter' at bits={bits} is for at most "
                f"{native_mpi.most_ranks(bits)} ranks, got {self.size}: take exchange='two_phase'"
            )

    def _reduce(self, item: Item, out: Tensor, codec: Codec, step: int) -> None:
        assert item.scale is not None
        native_mpi.allreduce(
            item.x, out, self._comm, codec.block(item.numel), *codec.code,
            codec.seed, step, item.identity, codec.correlated, item.scale, native_mpi.CHUNK,
        )  # fmt: skip

    def _nbytes(self, item: Item, codec: Codec) -> int:
        if codec.kind is CodeKind.LINEAR:
            return super()._nbytes(item, codec)
        norms = codec.num_norms(item.numel) * codec.norm_dtype(item.dtype).itemsize
        return norms + native_mpi.combined_bytes(
            item.numel, codec.block(item.numel), codec.bits, self.size
        )


class NcclExchange(NativeExchange):
    """Over NCCL: all is enqueued on one stream, and the host waits for nothing. Linear codes."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.transport.nccl is not None
        self._nccl = setup.transport.nccl

    def _reduce(self, item: Item, out: Tensor, codec: Codec, step: int) -> None:
        assert item.scale is not None
        take, device = self._take, item.device
        norms = take(codec.num_norms(item.numel), codec.norm_dtype(item.dtype), device)
        squares = None
        if self.options.norm == "l2":
            squares = take(norms.numel(), torch.int64, device)
        words = take(codec.num_words(item.numel), codec.word_dtype, device)
        self._nccl.connect().allreduce(
            item.x, out, norms, squares, words, codec.block(item.numel), *codec.code,
            codec.seed, step, item.identity, codec.correlated, item.scale,
        )  # fmt: skip

    def _nbytes(self, item: Item, codec: Codec) -> int:
        squares = 8 * codec.num_norms(item.numel) if self.options.norm == "l2" else 0
        return super()._nbytes(item, codec) + squares
