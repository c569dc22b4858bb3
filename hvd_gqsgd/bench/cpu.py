"""CPU time of a whole exchange, for each operator: ``hvd-gqsgd bench cpu``.

All ranks run in this process, one after the other, on one thread, without communication. The time
covers norms, widths, codes, rounding and decoding of one rank. The operators run in turn, and the
fastest round of each counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd._native import ops
from hvd_gqsgd.bench.operators import OPERATORS
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

__all__ = ["main", "measure"]

ARMS: dict[str, dict[str, Any]] = {
    **OPERATORS,
    "4 bits per block of 128": {"bits": BlockBits(4, block_size=128)},
    "8 bits per block": {"bits": BlockBits(8)},
    "8 bits per block Allreduce": {"bits": BlockBits(8), "exchange": "allreduce"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench cpu",
        description="Times the CPU's part of an exchange, for each operator.",
    )
    parser.add_argument("--ranks", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--numel", type=int, default=2**22, help="elements (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    for name, least in (("ranks", 2), ("numel", 1), ("repeats", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    result = measure(options.ranks, options.numel, options.repeats)
    if options.json:
        print(json.dumps(result))
        return
    show_table(
        ["", "exchange", "ns an element", "to 4 bits"],
        [
            [
                row["name"],
                row["exchange"],
                f"{row['ns_per_element']:.3f}",
                f"{row['to_4_bits']:.2f}",
            ]
            for row in result["rows"]
        ],
        title=f"{options.ranks} ranks, {options.numel:,} float32, {result['instruction_set']}, "
        f"one thread; CPU time of a rank, fastest of {options.repeats} rounds",
    )


def measure(ranks: int, numel: int, repeats: int) -> dict[str, Any]:
    """Times all operators that have levels for this number of ranks.

    Returns:
        The instruction set, and "rows" with the "name", the "exchange", "ns_per_element" of a rank,
        and "to_4_bits", the ratio to the operator "4 bits".
    """
    rows = _gradients(ranks, numel)
    arms = {name: Options(**options) for name, options in ARMS.items()}
    worlds = {name: SimulatedRanks(ranks, options) for name, options in arms.items()}
    least: dict[str, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(repeats + 1):
            for name, world in list(worlds.items()):
                try:
                    seconds = _timed(world, rows)
                except ValueError:  # the lanes are too narrow
                    del worlds[name]
                    continue
                least[name] = min(least.get(name, seconds), seconds)
    finally:
        torch.set_num_threads(threads)
    return {
        "instruction_set": ops.instruction_set(),
        "rows": [
            {
                "name": name,
                "exchange": arms[name].exchange_for(ranks),
                "ns_per_element": seconds * 1e9 / (numel * ranks),
                "to_4_bits": seconds / least["4 bits"],
            }
            for name, seconds in least.items()
        ],
    }


def _timed(world: SimulatedRanks, rows: Tensor) -> float:
    """CPU seconds of all ranks."""
    start = time.thread_time()
    world.means([[("", row)] for row in rows])
    return time.thread_time() - start


def _gradients(ranks: int, numel: int) -> Tensor:
    """Normal numbers; each run of 256 has a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(-(-numel // 256), generator=generator).exp2().repeat_interleave(256)
    return torch.randn(ranks, numel, generator=generator) * scales[:numel]
