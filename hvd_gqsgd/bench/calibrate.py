"""What the performance model needs to know of a machine: ``hvd-gqsgd bench calibrate``.

Measured on the ranks themselves, all at the same time, so that what they share is shared here too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence

import horovod.torch as hvd
import torch

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench.rounds import interleaved, progress_bar
from hvd_gqsgd.codecs import CodeKind
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.launch import add_arguments, is_rank, launch

__all__ = ["main", "measure"]

SMALL, LARGE = 2**21, 2**23
"""Elements of int32 between which the time of a byte is taken."""
TENSORS = 100
BESIDE = 8
"""How often the kernels run on LARGE elements while a sum of as many words is on its way."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Launches itself on several ranks, and prints a machine for ``hvd-gqsgd model`` as JSON."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench calibrate",
        description="Measures what hvd-gqsgd model --machine FILE needs to know, as JSON.",
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="what it prints is JSON anyway")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if not is_rank():
        sys.exit(launch("hvd_gqsgd.bench.calibrate", given, options.ranks, options.rate))
    hvd.init()
    torch.set_num_threads(1)
    with progress_bar(options.repeats) as progress:
        machine = measure(options.repeats, progress)
    if hvd.rank() == 0:
        print(json.dumps(dataclasses.asdict(machine)))


def measure(repeats: int, progress: Callable[[], object] = lambda: None) -> Machine:
    """A collective call; the same on all ranks. Needs two ranks or more.

    Raises:
        RuntimeError: there is one rank alone.
    """
    n = hvd.size()
    if n < 2:
        raise RuntimeError("a link needs two ranks, and Horovod has one")
    words = {size: torch.zeros(size, dtype=torch.int32) for size in (1, SMALL, LARGE)}
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(hvd.rank()))
    half, out = x.half(), torch.empty_like(x)
    norms = torch.empty(LARGE // 1024, dtype=torch.int32)
    codes = torch.empty(LARGE // 4, dtype=torch.int32)
    tensors = [torch.randn(4096) for _ in range(TENSORS)]
    compressors = {False: hvd.Compression.none, True: GlobalQSGD(bits=8)}

    def exchange(compressed: bool) -> None:
        compressor = compressors[compressed]
        handles = []
        for i, tensor in enumerate(tensors):
            sent, context = compressor.compress(tensor)
            handles.append((hvd.allreduce_async(sent, name=f"{i}.{compressed}"), context))
        for handle, context in handles:
            compressor.decompress(hvd.synchronize(handle), context)

    def two_phase(size: int) -> None:
        hvd.alltoall(words[size], name="alltoall")
        hvd.allgather(words[size][: size // n], name="allgather")

    def kernels() -> None:
        for name in ("norm", "quantize", "dequantize"):
            calls[name]()

    def beside() -> None:
        handle = hvd.allreduce_async_(words[LARGE], op=hvd.Sum, name="beside")
        for _ in range(BESIDE):
            kernels()
        hvd.synchronize(handle)

    code = (1024, CodeKind.LINEAR, 8, 127)
    place = (0, 0, 0, 0, 1, True)
    calls: dict[str, Callable[[], object]] = {
        **{
            f"sum {size}": functools.partial(hvd.allreduce_, tensor, op=hvd.Sum, name="sum")
            for size, tensor in words.items()
        },
        **{f"two {size}": functools.partial(two_phase, size) for size in (SMALL, LARGE)},
        "plain": lambda: exchange(False),
        "compressed": lambda: exchange(True),
        "norm": lambda: ops.block_max(x, 1024, norms),
        "quantize": lambda: ops.quantize(x, norms, codes, *code, *place),
        "dequantize": lambda: ops.dequantize(codes, norms, out, *code, 1, 1.0),
        "kernels": kernels,
        "beside": beside,
        "cast": lambda: half.copy_(x),
        "copy": lambda: out.copy_(x),
    }
    seconds = {
        name: timing.median
        for name, timing in interleaved(calls, repeats, progress=progress).items()
    }

    def of_a_byte(name: str) -> float:
        return (seconds[f"{name} {LARGE}"] - seconds[f"{name} {SMALL}"]) / (4 * (LARGE - SMALL))

    each = (n - 1) / n
    held_up = (seconds["beside"] - seconds[f"sum {LARGE}"]) / (BESIDE * seconds["kernels"])
    # What is left of many small tensors without the time of their bytes.
    sent = of_a_byte("sum") * sum(tensor.nbytes for tensor in tensors)
    plain = seconds["plain"] - 2 * seconds["sum 1"] - sent
    compressed = seconds["compressed"] - 4 * seconds["sum 1"] - sent / 4
    return Machine(
        alpha=20e-6,  # much less than an operation of Horovod's takes, which is measured
        beta=2 * each / of_a_byte("sum"),
        gamma=1e15,  # within beta
        beta_two_phase=2 * each / of_a_byte("two"),
        operation=seconds["sum 1"],
        tensor=max(0.0, plain) / TENSORS,
        compressed_tensor=max(0.0, compressed - plain) / TENSORS / 2,
        norm=seconds["norm"] / LARGE,
        quantize=seconds["quantize"] / LARGE,
        dequantize=seconds["dequantize"] / LARGE,
        cast=seconds["cast"] / LARGE,
        copy=seconds["copy"] / LARGE / 4,
        exposed=min(1.0, max(0.0, held_up)),
    )


if __name__ == "__main__":
    main()
