"""What the Horovod examples share: the compression, its options, and what it counts."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor, nn

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, Stats, allreduce
from hvd_gqsgd.bench.error import AUTHORS
from hvd_gqsgd.bench.wire import wire_bytes

AUTHORS_BUCKET = 25 * 2**20  # bytes, as in DistributedDataParallel


def add_compression_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides how gradients are exchanged."""
    parser.add_argument(
        "--compression", choices=("none", "fp16", "gqsgd", "authors"), default="gqsgd",
        help="authors: the scheme of Global-QSGD's published code",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=width, default=8,
        help="lane width of gqsgd, 2 to 16, 'dynamic' (DQ-SGD), 'block' (a width per block), or "
        "'auto' (measured)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, default=5, help="mean bits if they are dynamic or per block"
    )
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--exchange", choices=("auto", "allreduce", "two_phase"), default="auto")
    parser.add_argument("--norm", choices=("max", "l2"), default="max")
    parser.add_argument(
        "--record", type=Path, metavar="FILE",
        help="do not compress, and save the gradients of the last step, for hvd-gqsgd bench "
        "frontier",
    )  # fmt: skip


def width(text: str) -> int | str:
    return text if text in ("auto", "dynamic", "block") else int(text)


class Counted(Compressor):
    """One of Horovod's own compressors, which counts bytes by the rules of GlobalQSGD's stats()."""

    def __init__(self, compressor: type[Compressor]) -> None:
        self._compressor = compressor
        self._stats = Stats()

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        compressed, ctx = self._compressor.compress(tensor)
        self._stats.tensors += 1
        if compressed is tensor:
            self._stats.tensors_bypassed += 1
            self._stats.bypassed_bytes += tensor.nbytes
        else:
            self._stats.compressed_bytes_before += tensor.nbytes
            self._stats.compressed_bytes_on_wire += compressed.nbytes
        return compressed, ctx

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        if ctx is None:  # a sparse gradient, on which Horovod's fp16 fails
            return tensor
        return self._compressor.decompress(tensor, ctx)

    def stats(self) -> Stats:
        return dataclasses.replace(self._stats)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to go on from."""


class Recorded(Counted):
    """No compression; keeps the gradients of the last step for ``hvd-gqsgd bench frontier``."""

    def __init__(self) -> None:
        super().__init__(hvd.Compression.none)
        self._gradients: list[Tensor] = []
        self._complete = False

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        if self._complete:  # of the step before
            self._gradients, self._complete = [], False
        self._gradients.append(tensor.detach().clone())
        return super().compress(tensor)

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        self._complete = True
        return super().decompress(tensor, ctx)

    def save(self, path: Path) -> None:
        """Writes the gradients of all ranks on rank 0; all ranks must call this."""
        rows = [hvd.allgather(g[None], name=f"row.{i}") for i, g in enumerate(self._gradients)]
        if hvd.rank() == 0:
            torch.save(rows, path)


class Authors(Compressor):
    """The scheme of Global-QSGD's published code, to compare with: gradients are flattened into
    buckets, each has one norm, and every rank rounds by random numbers of its own.

    There, codes of an int8 are x * 127 / (n M), rounded, and when all n ranks round up their sum
    may overflow: 4 codes of 32 make 128. Here there are floor(255 / 2n) levels a side, 31 on 4
    ranks, and no sum overflows.

    A Compressor sees one tensor at a time. So Horovod gets a placeholder of one number, and the
    buckets are exchanged when the first gradient is asked for.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._next = 0  # number of the next bucket, which its dither depends on
        self._gradients: list[Tensor] = []
        self._means: list[Tensor] = []
        self._stats = Stats(bits=8)

    def compress(self, tensor: Tensor) -> tuple[Tensor, int]:
        if self._means:  # of the step before
            self._gradients, self._means = [], []
        self._gradients.append(tensor.detach())
        self._stats.tensors += 1
        return tensor.new_zeros(1), len(self._gradients) - 1

    def decompress(self, tensor: Tensor, ctx: int | None) -> Tensor:
        if ctx is None:  # a sparse gradient, which Horovod has gathered itself
            return tensor
        if not self._means:
            self._exchange()
        return self._means[ctx]

    def _exchange(self) -> None:
        for bucket in _buckets(self._gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            allreduce(flat, None, out=flat, step=self._next, seed=self._seed, bits=8, **AUTHORS)
            self._next += 1
            parts = flat.split([gradient.numel() for gradient in bucket])
            self._means += [part.view(g.shape) for part, g in zip(parts, bucket, strict=True)]
            self._stats.elements += flat.numel()
            self._stats.compressed_bytes_before += flat.nbytes
            self._stats.compressed_bytes_on_wire += wire_bytes([flat.numel()], block_size=None)
        self._stats.steps += 1

    def stats(self) -> Stats:
        return dataclasses.replace(self._stats)

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.nbytes for g in [*bucket, gradient]) > AUTHORS_BUCKET:
            yield bucket
            bucket = []
        bucket.append(gradient)
    yield bucket


Compression = Counted | GlobalQSGD | Authors


def make_compression(args: argparse.Namespace, model: nn.Module, steps: int) -> Compression:
    """The one that was asked for, for a run of so many steps."""
    if args.record:
        args.compression = "none"
        return Recorded()
    if args.compression == "authors":
        return Authors(args.seed)
    if args.compression == "gqsgd":
        choices = {
            "dynamic": DynamicBits(args.budget, total_steps=steps),
            "block": BlockBits(args.budget),
        }
        return GlobalQSGD(
            bits=choices.get(args.bits, args.bits),
            dither=args.dither,
            exchange=args.exchange,
            norm=args.norm,
            seed=args.seed,
            named_parameters=model.named_parameters(),
        )
    return Counted(getattr(hvd.Compression, args.compression))


def replica_difference(model: nn.Module) -> float:
    """The largest difference between ranks in any parameter; not a number if there is a NaN."""
    parameters = nn.utils.parameters_to_vector(model.parameters()).detach()
    largest = hvd.allreduce(parameters, op=hvd.Max, name="largest")
    smallest = hvd.allreduce(parameters, op=hvd.Min, name="smallest")
    return (largest - smallest).abs().max().item()


def report_bytes(result: dict[str, Any]) -> None:
    for text, of in (("gradient bytes", ""), ("  if compressed", "compressed_")):
        before, on_wire = result[f"{of}bytes_before"], result[f"{of}bytes_on_wire"]
        if before:
            print(
                f"{text:<20}{before:,} before, {on_wire:,} on the wire: "
                f"{before / on_wire:.2f} times fewer"
            )
