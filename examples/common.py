"""What the Horovod examples share: options, the compression, and bytes; for those of the three
domains also the order of the data, checkpoints, progress, TensorBoard and the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor
from torch import Tensor, nn
from tqdm import tqdm

from hvd_gqsgd import DynamicBits, GlobalQSGD, Stats, allreduce
from hvd_gqsgd.bench.error import wire_bytes

AUTHORS_BUCKET = 25 * 2**20  # bytes, as in DistributedDataParallel

# --- options -------------------------------------------------------------------------------------


def add_compression_arguments(parser: argparse.ArgumentParser) -> None:
    """What decides how gradients are exchanged."""
    parser.add_argument(
        "--compression", choices=("none", "fp16", "gqsgd", "authors"), default="gqsgd",
        help="authors: the scheme of Global-QSGD's published code",
    )  # fmt: skip
    parser.add_argument(
        "--bits", type=width, default=8, help="lane width of gqsgd, 2 to 16, or 'dynamic' (DQ-SGD)"
    )
    parser.add_argument("--budget", type=float, default=5, help="mean bits if they are dynamic")
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--exchange", choices=("auto", "allreduce", "two_phase"), default="auto")
    parser.add_argument("--norm", choices=("max", "l2"), default="max")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What has nothing to do with the model: seed, checkpoints and output."""
    parser.add_argument("--seed", type=int, default=0, help="of the model, the data and the dither")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    parser.add_argument("--logdir", type=Path, metavar="FOLDER", help="log for TensorBoard there")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="save to this file, and go on from it"
    )
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS")
    parser.add_argument(
        "--stop-at", type=int, metavar="STEP", help="save and stop there, as if interrupted"
    )


def width(text: str) -> int | str:
    return text if text == "dynamic" else int(text)


# --- compression ---------------------------------------------------------------------------------


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
        return self._compressor.decompress(tensor, ctx)

    def stats(self) -> Stats:
        return dataclasses.replace(self._stats)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is nothing to go on from."""


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

    def decompress(self, tensor: Tensor, ctx: int) -> Tensor:
        if not self._means:
            self._exchange()
        return self._means[ctx]

    def _exchange(self) -> None:
        for bucket in _buckets(self._gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            allreduce(
                flat, None, out=flat, step=self._next, seed=self._seed,
                bits=8, block_size=None, correlated=False,
            )  # fmt: skip
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
    if args.compression == "authors":
        return Authors(args.seed)
    if args.compression == "gqsgd":
        dynamic = args.bits == "dynamic"
        return GlobalQSGD(
            bits=DynamicBits(args.budget, total_steps=steps) if dynamic else args.bits,
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


# --- a run ---------------------------------------------------------------------------------------


class Order:
    """Which rows a rank takes in a step: in each epoch all, in an order that the seed decides."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        if not hvd.size() <= batch_size <= rows:
            sys.exit(f"--batch-size must be from {hvd.size()} to {rows}, got {batch_size}")
        self.steps_per_epoch = rows // batch_size
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def rows(self, step: int) -> Tensor:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 2**20 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._rows, generator=generator)
        batch = self._order[place * self._batch_size : (place + 1) * self._batch_size]
        return batch[hvd.rank() :: hvd.size()]


def seed_step(seed: int, step: int) -> None:
    """What is random on this rank in this step follows from these alone, so a run that goes on
    from a checkpoint needs no state of random generators."""
    torch.manual_seed((seed * 2**24 + step) * 2**12 + hvd.rank())


class Run:
    """A training run: its steps from where a checkpoint left off, and what is kept of them."""

    def __init__(
        self,
        args: argparse.Namespace,
        model: nn.Module,
        optimizers: Sequence[Any],
        schedules: Sequence[Any],
        compression: Compression,
        total: int,
    ) -> None:
        self._args, self._total = args, total
        self.model, self.compression = model, compression
        self._parts: dict[str, Any] = {"model": model, "compression": compression}
        self._parts |= {f"optimizer {i}": part for i, part in enumerate(optimizers)}
        self._parts |= {f"schedule {i}": part for i, part in enumerate(schedules)}
        self._schedule = schedules[0]
        self._start = 0
        self._before = {"seconds": 0.0}  # counts of the runs that this one goes on from
        self._began = time.perf_counter()
        self._sparse_bytes = 0  # handed to Allgather
        self._sparse: set[Tensor] = set()
        self._progress: Any = None
        self._writer: Any = None

    def steps(self) -> Iterator[int]:
        """The numbers of the steps; each is seeded, and saved if it is time."""
        self._load()
        end = min(self._args.stop_at or self._total, self._total)
        if hvd.rank() == 0 and self._args.logdir:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._args.logdir, purge_step=self._start)
        self._began = time.perf_counter()
        self._progress = tqdm(
            initial=self._start, total=self._total, unit="step", disable=hvd.rank() != 0
        )
        with self._progress:
            for step in range(self._start, end):
                seed_step(self._args.seed, step)
                yield step
                self._progress.update()
                if self._args.checkpoint and (step + 1) % self._args.save_every == 0:
                    self._save(step + 1)
        if self._args.checkpoint:
            self._save(max(end, self._start))
        if end < self._total:
            if hvd.rank() == 0:
                print(f"stopped at step {end} of {self._total}")
            hvd.barrier()
            sys.exit()

    def log(self, step: int, loss: Tensor) -> None:
        """For TensorBoard and the progress bar."""
        if hvd.rank() != 0 or step % 10:
            return
        self._progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if self._writer:
            counts = self._counts()
            self._writer.add_scalar("loss", loss.item(), step)
            self._writer.add_scalar("learning rate", self._schedule.get_last_lr()[0], step)
            self._writer.add_scalar("bits", self.compression.stats().bits, step)
            self._writer.add_scalar("bytes on the wire", counts["bytes_on_wire"], step)

    def count_sparse(self, parameters: Sequence[Tensor]) -> None:
        """Counts the sparse gradients that Horovod gathers: before ``optimizer.step()``, while they
        are still this rank's own, with the indices and values that it hands over."""
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None and gradient.is_sparse
            self._sparse_bytes += gradient._indices().nbytes + gradient._values().nbytes
        self._sparse.update(parameters)

    def finish(self, domain: str, metric: str, value: float) -> None:
        """Reports on rank 0; ends with an error if the replicas differ."""
        seconds = self._counts()["seconds"]
        difference = replica_difference(self.model)
        if hvd.rank() == 0:
            if self._writer:
                self._writer.add_scalar(metric, value, self._total)
                self._writer.close()
            dense = [p for p in self.model.parameters() if p not in self._sparse]
            parameters = nn.utils.parameters_to_vector(self.model.parameters()).detach()
            args = self._args
            result = {
                "domain": domain,
                "metric": metric,
                metric: value,
                "compression": args.compression,
                "bits": args.bits if args.compression == "gqsgd" else "",
                "dither": args.dither if args.compression == "gqsgd" else "",
                "exchange": self._exchange(),
                "ranks": hvd.size(),
                "seed": args.seed,
                "steps": self._total,
                "parameters": parameters.numel(),
                "dense_numels": [p.numel() for p in dense],
                **self._counts(),
                "seconds": seconds,
                "replica_difference": difference,
                "digest": hashlib.sha256(parameters.numpy().tobytes()).hexdigest(),
            }
            self._report(result)
            if args.json:
                write_atomically(args.json, json.dumps(result, indent=2) + "\n")
        if difference != 0:
            sys.exit(f"rank {hvd.rank()}: the replicas differ, by up to {difference:g}")

    def _report(self, result: dict[str, Any]) -> None:
        settings = [str(result[key]) for key in ("compression", "dither", "bits") if result[key]]
        print(f"compression         {', '.join(settings)}; {result['ranks']} rank(s)")
        print(f"{result['metric']:<20}{result[result['metric']]:.4f}")
        report_bytes(result)
        if result["sparse_bytes"]:
            print(f"  sparse            {result['sparse_bytes']:,} handed to Allgather by a rank")
        print(f"training            {result['seconds']:.2f} s, {result['steps']} steps")
        print(f"replica difference  {result['replica_difference']:g}")

    def _exchange(self) -> str:
        """The one that was taken, if the compression has several."""
        if isinstance(self.compression, GlobalQSGD):
            return self.compression.options.exchange_for(hvd.size())
        return ""

    def _counts(self) -> dict[str, float]:
        """Seconds and bytes of this rank from the first step on.

        An Allgather of sparse gradients, B bytes from each of n ranks, takes half of what an
        Allreduce of n B bytes does; it counts as that, as in GlobalQSGD's stats().
        """
        stats = self.compression.stats()
        gathered = hvd.size() * self._sparse_bytes // 2
        counts = {
            "seconds": time.perf_counter() - self._began,
            "bytes_before": stats.bytes_before + gathered,
            "bytes_on_wire": stats.bytes_on_wire + gathered,
            "compressed_bytes_before": stats.compressed_bytes_before,
            "compressed_bytes_on_wire": stats.compressed_bytes_on_wire,
            "sparse_bytes": self._sparse_bytes,
        }
        return {key: count + self._before.get(key, 0) for key, count in counts.items()}

    def _save(self, step: int) -> None:
        if hvd.rank() == 0:
            state: dict[str, Any] = {k: part.state_dict() for k, part in self._parts.items()}
            state |= {"step": step, "counts": self._counts(), "total": self._total}
            beside = self._args.checkpoint.with_suffix(".tmp")
            torch.save(state, beside)
            os.replace(beside, self._args.checkpoint)  # there is always a whole one

    def _load(self) -> None:
        """On all ranks, from the file that rank 0 sees."""
        path = self._args.checkpoint
        state = None
        if hvd.rank() == 0 and path and path.exists():
            state = torch.load(path, weights_only=True)
        state = hvd.broadcast_object(state, root_rank=0, name="checkpoint")
        if state is None:
            return
        if state["total"] != self._total:
            sys.exit(f"{path} is of a run of {state['total']} steps, this one has {self._total}")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._start, self._before = state["step"], state["counts"]
        if hvd.rank() == 0:
            print(f"going on from step {self._start} of {path}")


def write_atomically(path: Path, text: str) -> None:
    """So that whoever finds the file finds all of it."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)
