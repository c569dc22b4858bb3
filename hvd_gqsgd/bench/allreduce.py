"""Allreduces of all sizes through Horovod: ``hvd-gqsgd bench allreduce [--rate 1gbit]``.

``busbw`` is the bus bandwidth of nccl-tests, 2 (n - 1) / n times the gradient's bytes over the
time: the bandwidth at which an uncompressed ring takes as long.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_gqsgd.bench.figure import STYLES, draw, figure_file, log_ticks, new_figure, save
from hvd_gqsgd.bench.hosts import add_arguments, is_rank, relaunch
from hvd_gqsgd.bench.operators import OPERATORS
from hvd_gqsgd.bench.table import show_table

__all__ = ["main", "measure"]

FP32, FP16 = "fp32", "fp16"


def main(arguments: Sequence[str] | None = None) -> None:
    """Launches itself on several ranks, measures there, and prints on rank 0."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench allreduce",
        description="Times hvd.allreduce, with GlobalQSGD and without.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--smallest", type=float, default=4, help="kilobytes of float32 (default: %(default)s)"
    )
    parser.add_argument(
        "--largest", type=float, default=64, help="megabytes (default: %(default)s); up to 256"
    )
    parser.add_argument("--repeats", type=int, default=11, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot", type=figure_file, metavar="FILE", help="draw the medians, as .png, .pdf or .svg"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if not 0 < options.smallest * 2**10 <= options.largest * 2**20 or options.repeats < 1:
        parser.error(
            "--smallest must be above 0 kB and at most --largest, and --repeats at least 1, got "
            f"{options.smallest:g} kB, {options.largest:g} MB and {options.repeats}"
        )
    if not is_rank():
        sys.exit(relaunch("hvd_gqsgd.bench.allreduce", given, options))

    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.set_num_threads(1)
    sizes, most = [round(options.smallest * 2**8)], round(options.largest * 2**18)
    while sizes[-1] < most:
        sizes.append(min(sizes[-1] * 4, most))
    result = measure(sizes, options.repeats)
    if hvd.rank() == 0:
        if options.plot is not None:
            _plot(result, options.plot)
        if options.json:
            print(json.dumps(result))
        else:
            _show(result)


def measure(sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Times all arms; a collective call.

    Args:
        sizes: numbers of float32 elements.
        repeats: number of rounds that count.

    Returns:
        ``ranks``, and in ``rows`` for each size and arm: ``bytes`` of the tensor, ``ms`` and
        ``ms_p99`` of the slowest rank, ``times_faster`` than fp32, ``wire_bytes`` that a rank
        passed to collectives, and ``busbw`` in GB/s.
    """
    import horovod.torch as hvd
    import torch

    from hvd_gqsgd import GlobalQSGD
    from hvd_gqsgd.bench.rounds import interleaved, progress_bar

    n, rows = hvd.size(), []
    with progress_bar(len(sizes) * repeats) as progress:
        for numel in sizes:
            x = torch.randn(numel, generator=torch.Generator().manual_seed(hvd.rank()))
            compressors: dict[str, Any] = {
                FP32: hvd.Compression.none,
                FP16: hvd.Compression.fp16,
                **{name: GlobalQSGD(min_numel=1, **each) for name, each in OPERATORS.items()},
            }
            calls = {
                name: functools.partial(hvd.allreduce, x, name=name, compression=compressor)
                for name, compressor in compressors.items()
            }
            timings = interleaved(calls, repeats, progress=progress)
            for name, timing in timings.items():
                wire = x.nbytes if name == FP32 else x.nbytes // 2
                if name in OPERATORS:
                    stats = compressors[name].stats()
                    wire = stats.compressed_bytes_on_wire // stats.steps
                rows.append(
                    {
                        "bytes": x.nbytes,
                        "arm": name,
                        "ms": timing.median * 1e3,
                        "ms_p99": timing.p99 * 1e3,
                        "times_faster": timings[FP32].median / timing.median,
                        "wire_bytes": wire,
                        "busbw": 2 * (n - 1) / n * x.nbytes / timing.median / 1e9,
                        "discarded": timing.discarded,
                    }
                )
    return {"ranks": n, "repeats": repeats, "rows": rows}


def _show(result: dict[str, Any]) -> None:
    cells, before = [], None
    for row in result["rows"]:
        size = "" if row["bytes"] == before else _size(row["bytes"])
        before = row["bytes"]
        cells.append(
            [
                size, row["arm"], f"{row['ms']:.2f}", f"{row['ms_p99']:.2f}",
                f"{row['times_faster']:.2f}", _size(row["wire_bytes"]), f"{row['busbw']:.3f}",
            ]
        )  # fmt: skip
    print(f"{result['ranks']} ranks, {result['repeats']} rounds; times of the slowest rank")
    header = ["float32", "", "ms, p50", "p99", "times faster", "sent", "busbw, GB/s"]
    show_table(header, cells, left=2)


def _size(count: int) -> str:
    for unit, one in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:.4g} {unit}"
    return f"{count} B"


def _plot(result: dict[str, Any], file: Path) -> None:
    """Draws the medians over the size of the tensor."""
    figure, (axes,) = new_figure()
    for style, arm in zip(
        STYLES, dict.fromkeys(row["arm"] for row in result["rows"]), strict=False
    ):
        rows = [row for row in result["rows"] if row["arm"] == arm]
        sizes = [row["bytes"] / 2**20 for row in rows]
        draw(axes, sizes, [row["ms"] for row in rows], style, arm)
    axes.set(
        xscale="log", yscale="log", xlabel="tensor of float32 (MiB)", ylabel="median time (ms)"
    )
    axes.set_title(f"Allreduce through Horovod, {result['ranks']} ranks")
    for axis in (axes.xaxis, axes.yaxis):
        log_ticks(axis)
    axes.legend(fontsize=9)
    save(figure, file)


if __name__ == "__main__":
    main()
