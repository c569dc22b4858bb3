"""What the three domains share: the order of the data, checkpoints, progress and the result.

Data and randomness of a step follow from ``--seed``, its number and the rank alone. So a run that
goes on from a checkpoint needs no state of random generators, and no place in the data.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from common import Compression, Recorded, replica_difference, report_bytes
from torch import Tensor, nn
from tqdm import tqdm

from hvd_gqsgd import GlobalQSGD


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


class Order:
    """Which rows a rank takes in a step: in each epoch all, in an order that the seed decides."""

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        if not hvd.size() <= batch_size <= rows:
            sys.exit(f"--batch-size must be from {hvd.size()} to {rows}, got {batch_size}")
        self.steps_per_epoch = rows // batch_size
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0)

    def rows(self, step: int, rank: int, ranks: int) -> Tensor:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 2**20 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._rows, generator=generator)
        batch = self._order[place * self._batch_size : (place + 1) * self._batch_size]
        return batch[rank::ranks]


def seed_step(seed: int, step: int, rank: int) -> None:
    """What is random on a rank in a step follows from these alone, so a run that goes on
    from a checkpoint needs no state of random generators."""
    torch.manual_seed((seed * 2**24 + step) * 2**12 + rank)


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
                seed_step(self._args.seed, step, hvd.rank())
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
            stats = self.compression.stats()
            self._writer.add_scalar("bits", 32 if stats.setting == "fp32" else stats.bits, step)
            self._writer.add_scalar("bytes on the wire", counts["bytes_on_wire"], step)
            if stats.setting:  # of bits="auto"
                self._writer.add_text("setting", stats.setting, step)
                self._writer.add_scalar("decisions", stats.decisions, step)

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
        if isinstance(self.compression, Recorded):
            self.compression.save(self._args.record)
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
        """The one that was taken, if the compression has several, and not one a step."""
        if isinstance(self.compression, GlobalQSGD) and self.compression.options.bits != "auto":
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
        found = b""
        if hvd.rank() == 0 and path and path.exists():
            found = path.read_bytes()
        # As a tensor, since hvd.broadcast_object would unpickle whatever it gets.
        size = hvd.broadcast(torch.tensor(len(found)), root_rank=0, name="checkpoint.size")
        if not size:
            return
        content = torch.empty(int(size), dtype=torch.uint8)
        if hvd.rank() == 0:
            content = torch.frombuffer(bytearray(found), dtype=torch.uint8)
        content = hvd.broadcast(content, root_rank=0, name="checkpoint")
        state = torch.load(io.BytesIO(content.numpy()), weights_only=True)
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
