"""Measures a machine for the performance model: ``hvd-gqsgd bench calibrate``.

All ranks measure at the same time, so that shared resources are shared here as in training.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence

from hvd_gqsgd.bench.hosts import add_arguments, is_rank, relaunch
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.node_model import Cluster, link_bytes
from hvd_gqsgd.tools.settings import FP32, TWO_PHASE_8

__all__ = ["main", "measure"]

MEGABYTES = 32.0
"""The largest message, of int32. The time per byte is the slope between a quarter of it and all."""
TENSORS = 100
"""Number of small tensors, for the time per tensor."""
BESIDE = 8
"""Times that the kernels run beside one sum of the largest message."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Launches itself on several ranks, and prints a machine for ``hvd-gqsgd model`` as JSON."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench calibrate",
        description="Measures a machine for hvd-gqsgd model --machine FILE, as JSON.",
    )
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument(
        "--megabytes", type=float, default=MEGABYTES,
        help="size of the largest message (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.repeats < 1 or not options.megabytes >= 1:
        parser.error(
            "--repeats and --megabytes must be at least 1, got "
            f"{options.repeats} and {options.megabytes:g}"
        )
    if not is_rank():
        sys.exit(relaunch("hvd_gqsgd.bench.calibrate", given, options))

    import horovod.torch as hvd
    import torch

    from hvd_gqsgd.bench.rounds import progress_bar

    hvd.init()
    torch.set_num_threads(1)
    with progress_bar(options.repeats) as progress:
        machine = measure(options.repeats, options.megabytes, progress)
    if hvd.rank() == 0:
        print(json.dumps(dataclasses.asdict(machine)))


def measure(
    repeats: int, megabytes: float = MEGABYTES, progress: Callable[[], object] = lambda: None
) -> Machine:
    """Measures this machine, on two ranks of Horovod or more; a collective call.

    Args:
        repeats: number of rounds that count.
        megabytes: size of the largest message.
        progress: called after each round.

    Returns:
        The machine, the same on all ranks.

    Raises:
        RuntimeError: there is only one rank.
    """
    import horovod.torch as hvd
    import torch

    from hvd_gqsgd import GlobalQSGD
    from hvd_gqsgd._native import ops
    from hvd_gqsgd.bench.rounds import interleaved
    from hvd_gqsgd.codecs import CodeKind
    from hvd_gqsgd.engine.agreement import find_nodes
    from hvd_gqsgd.transports.horovod import HorovodTransport

    n = hvd.size()
    if n < 2:
        raise RuntimeError("calibration needs at least 2 ranks, got 1: pass --ranks 2 or more")
    nodes = find_nodes(HorovodTransport(), "nodes")
    on_node, mine = max(map(len, nodes.members)), nodes.of(hvd.rank())
    large = round(megabytes * 2**18) // 4096 * 4096
    small = large // 4
    words = {size: torch.zeros(size, dtype=torch.int32) for size in (1, small, large)}
    x = torch.randn(large, generator=torch.Generator().manual_seed(hvd.rank()))
    half, out = x.half(), torch.empty_like(x)
    norms = torch.empty(large // 1024, dtype=torch.int32)
    codes = torch.empty(large // 4, dtype=torch.int32)
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

    def inside(size: int) -> None:
        others = torch.tensor([rank in mine and rank != hvd.rank() for rank in range(n)])
        splits = others.int() * (size // on_node)
        hvd.alltoall(words[size][: splits.sum()], splits, name="inside")

    def kernels() -> None:
        for name in ("norm", "quantize", "dequantize"):
            calls[name]()

    def beside() -> None:
        handle = hvd.allreduce_async_(words[large], op=hvd.Sum, name="beside")
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
        **{f"two {size}": functools.partial(two_phase, size) for size in (small, large)},
        **{f"inside {size}": functools.partial(inside, size) for size in (small, large)},
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
        whole, part = seconds[f"{name} {large}"], seconds[f"{name} {small}"]
        if whole > part:
            return (whole - part) / (4 * (large - small))
        return whole / (4 * large)  # noise, or latency alone: a lower bound of the bandwidth

    # Ranks of a single machine use its memory as links.
    per_node = 1 if hvd.local_size() == n else hvd.local_size()
    cluster = Cluster(n // per_node, per_node)
    summed, sent_twice = (
        link_bytes(setting, 1, cluster, by_node=False) for setting in (FP32, TWO_PHASE_8)
    )
    held_up = (seconds["beside"] - seconds[f"sum {large}"]) / (BESIDE * seconds["kernels"])
    # The time of many small tensors without the time of their bytes.
    sent = of_a_byte("sum") * sum(tensor.nbytes for tensor in tensors)
    plain = seconds["plain"] - 2 * seconds["sum 1"] - sent
    compressed = seconds["compressed"] - 4 * seconds["sum 1"] - sent / 4
    sent_inside = (on_node - 1) / on_node
    return Machine(
        alpha=20e-6,  # small beside the measured time of an operation of Horovod
        beta=summed / of_a_byte("sum"),
        gamma=1e15,  # within beta
        beta_two_phase=sent_twice / of_a_byte("two"),
        operation=seconds["sum 1"],
        tensor=max(0.0, plain) / TENSORS,
        compressed_tensor=max(0.0, compressed - plain) / TENSORS / 2,
        norm=seconds["norm"] / large,
        quantize=seconds["quantize"] / large,
        dequantize=seconds["dequantize"] / large,
        cast=seconds["cast"] / large,
        copy=seconds["copy"] / large / 4,
        exposed=min(1.0, max(0.0, held_up)),
        inside=sent_inside / of_a_byte("inside") if sent_inside else Machine.inside,
    )


if __name__ == "__main__":
    main()
