"""Compares errors and losses with other compressors at equal bytes: ``hvd-gqsgd bench frontier``.

Gradients are synthetic and heavy-tailed, as in ``bench error``, or recorded: a file of
``torch.save`` has a list of tensors, one per parameter, of shape (ranks, *shape). Several files are
several steps of one training. Seeds are fixed, and nothing is timed.

``--train`` trains scripts with all settings of this package instead; see
``hvd_gqsgd.bench.trainer``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd.bench import rivals, trainer
from hvd_gqsgd.bench.error import AUTHORS, student
from hvd_gqsgd.bench.rivals import Estimate
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.bench.wire import wire_bytes, wire_bytes_of
from hvd_gqsgd.codecs.bit_schedule import DynamicBits
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

__all__ = ["main", "measure", "measure_block_sizes", "measure_steps"]

OURS: dict[str, dict[str, Any]] = {
    **{f"Allreduce, {bits} bits": {"bits": bits, "exchange": "allreduce"} for bits in (4, 8, 16)},
    **{
        f"two phases, {bits} bits": {"bits": bits, "exchange": "two_phase"}
        for bits in (2, 3, 4, 5, 6, 8)
    },
    **{f"per block, {bits} bits": {"bits": BlockBits(bits)} for bits in (2.5, 3, 4, 5)},
    **{f"per block, power 1, {bits} bits": {"bits": BlockBits(bits, 1)} for bits in (3, 4, 5)},
    **{
        f"per block, Allreduce, {bits} bits": {"bits": BlockBits(bits), "exchange": "allreduce"}
        for bits in (4, 8)
    },
    "exponential, 8 bits": {"bits": 8, "dither": "exponential"},
    "exponential, 4 bits": {"bits": 4, "dither": "exponential"},
    "authors' scheme, 8 bits": {"bits": 8, **AUTHORS},
    **{f"1/{size} at random": {"keep": 1 / size} for size in (8, 64)},
}
"""Options of this package's settings."""

BUDGETS = (4, 5, 6)
"""Mean bits at which widths per step are compared with one width."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024)
TOTALS = (3, 4, 5, 6, 8)
"""Bits an element, norms included, at which sizes of blocks are compared."""

MOST_MB = 2048  # all tensors in one bucket

Step = list[Tensor]
"""The gradients of a step: of each parameter, those of all ranks."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench frontier",
        description="Compares squared errors of means at equal bytes, with rival compressors.",
    )
    parser.add_argument(
        "gradients", nargs="*", type=Path, metavar="FILE",
        help="recorded gradients of a step, in the order of steps (default: synthetic ones)",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", nargs="+", type=int, metavar="N",
        help="numbers of ranks; of recorded gradients the first ones (default: all of them, or 8)",
    )  # fmt: skip
    parser.add_argument("--node", type=int, help="ranks of a node, for qgZ (default: all)")
    parser.add_argument(
        "--block-sizes", action="store_true",
        help="compare sizes of blocks for widths per block instead, at equal bytes with norms",
    )  # fmt: skip
    parser.add_argument(
        "--train", nargs="+", metavar="TASK",
        help="train scripts, such as 'examples/language.py --steps 100', with all ranks in this "
        "process, and compare their metrics",
    )  # fmt: skip
    parser.add_argument(
        "--settings", nargs="+", choices=(*trainer.SETTINGS, *trainer.POWER_SGD),
        metavar="SETTING",
        default=tuple(trainer.SETTINGS),
        help="for --train: some of "
        f"{', '.join([*trainer.SETTINGS, *trainer.POWER_SGD])} (default: all but PowerSGD)",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="for --train")
    parser.add_argument(
        "--results", type=Path, metavar="FILE",
        help="for --train: append each run to this file of JSON lines, and reuse its runs",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    for ranks in options.ranks or []:
        if not 2 <= ranks <= 127:
            parser.error(f"--ranks must be from 2 to 127, got {ranks}")
    if options.train:
        _train(options, parser)
        return
    try:
        steps = [load(path) for path in options.gradients]
    except ValueError as error:
        parser.error(str(error))
    most = len(steps[0][0]) if steps else 127
    worlds = options.ranks or [most if steps else 8]
    for ranks in worlds:
        if ranks > most:
            parser.error(f"--ranks must be at most the {most} recorded ones, got {ranks}")
        if options.node is not None and (options.node < 1 or ranks % options.node):
            parser.error(f"--node must divide the {ranks} ranks, got {options.node}")
    results = []
    for ranks in worlds:
        world = [[x[:ranks] for x in step] for step in steps] or [synthetic(ranks)]
        elements = f"{ranks} ranks, {sum(x[0].numel() for x in world[0]):,} elements"
        if options.block_sizes:
            sizes = measure_block_sizes(world[-1])
            results.append({"ranks": ranks, "block_sizes": sizes})
            if not options.json:
                _show_block_sizes(sizes, elements, options.markdown)
            continue
        rows = measure(world, options.node or ranks)
        over_steps = measure_steps(world) if len(world) > 1 else []
        results.append({"ranks": ranks, "rows": rows, "over_steps": over_steps})
        if not options.json:
            _show(rows, elements, options.markdown)
            if over_steps:
                _show(over_steps, f"{elements}, all {len(world)} steps", options.markdown)
    if options.json:
        print(json.dumps({"steps": max(len(steps), 1), "worlds": results}))


def _train(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if options.gradients:
        parser.error("--train does not take recorded gradients: leave FILE or --train out")
    if options.ranks and len(options.ranks) > 1:
        parser.error(f"--ranks must be one number for --train, got {options.ranks}")
    (ranks,) = options.ranks or [8]
    outcomes = trainer.compare(
        options.train, options.settings, options.seeds, ranks, options.results
    )
    if options.json:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    else:
        trainer.show(outcomes, options.markdown)


def _show(rows: Sequence[dict[str, Any]], title: str, markdown: bool) -> None:
    show_table(
        ["", "bits an element", "squared error to squared mean"],
        [[row["name"], f"{row['bits']:.2f}", f"{row['error']:.2e}"] for row in rows],
        title=title,
        markdown=markdown,
    )


def _show_block_sizes(rows: Sequence[dict[str, Any]], title: str, markdown: bool) -> None:
    cells = {(row["total"], row["block_size"]): f"{row['error']:.2e}" for row in rows}
    show_table(
        ["bits an element, with norms", *(f"blocks of {size}" for size in BLOCK_SIZES)],
        [[str(total), *(cells.get((total, size), "") for size in BLOCK_SIZES)] for total in TOTALS],
        title=f"{title}: squared error to squared mean",
        markdown=markdown,
    )


def load(path: Path) -> Step:
    """Reads a recorded step.

    Raises:
        ValueError: the file cannot be read, or has something else.
    """
    try:
        step = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not (
        isinstance(step, list)
        and step
        and all(isinstance(x, Tensor) and x.dim() > 1 and len(x) == len(step[0]) > 1 for x in step)
    ):
        raise ValueError(
            f"{path} must hold a list of tensors of shape (ranks, ...), for 2 ranks or more"
        )
    return [x.float() for x in step]


def synthetic(ranks: int) -> Step:
    """Independent numbers with Student's t distribution, and a scale for each row."""
    rng = np.random.default_rng(0)
    scales = torch.from_numpy(rng.lognormal(sigma=1.0, size=(512, 1))).float()
    return [student(rng, ranks, 512 * 512).view(ranks, 512, 512) * scales]


def measure(steps: Sequence[Step], node: int) -> list[dict[str, Any]]:
    """Measures all settings on the last step; earlier steps set the state of those that have one.

    Args:
        steps: gradients, in the order of steps.
        node: ranks of a node, for qgZ.

    Returns:
        A row for each setting that is possible for this number of ranks, in the order of bits:
        "name", "bits" on the wire per element, and "error", the squared error of the mean over the
        squared mean.
    """
    last = steps[-1]
    rows = torch.cat([x.flatten(1) for x in last], 1)
    true = rows.double().mean(0)
    estimates: dict[str, Estimate | None] = {
        name: _ours(last, options) for name, options in OURS.items()
    }
    estimates |= {
        "fp16": rivals.fp16(rows),
        "MXFP8": rivals.mx(rows, rivals.MXFP8),
        "MXFP4": rivals.mx(rows, rivals.MXFP4),
        "ZeRO++ qgZ, 4 bits": rivals.qgz(rows, node),
        "IntSGD, 8 bits": _taught(rivals.IntSgd(), steps) if len(steps) > 1 else None,
    }
    estimates |= {f"PowerSGD, rank {rank}": _power(steps, rank) for rank in (1, 2, 4)}
    result = [
        {
            "name": name,
            "bits": estimate.bits,
            "error": float((estimate.mean.double() - true).square().sum() / true.square().sum()),
        }
        for name, estimate in estimates.items()
        if estimate is not None
    ]
    return sorted(result, key=lambda row: row["bits"])


def measure_steps(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Compares one width with widths per step (DQ-SGD), per block and both, over all steps.

    Returns:
        Rows like those of ``measure``.
    """
    numels, size = [x[0].numel() for x in steps[0]], len(steps[0][0])
    result = []
    for bits in BUDGETS:
        per_step = DynamicBits(bits, total_steps=len(steps))
        choices: dict[str, int | DynamicBits | BlockBits] = {
            f"{bits} bits": bits,
            f"{bits} bits per step": per_step,
            f"{bits} bits per step, power 0.5": dataclasses.replace(per_step, power=0.5),
            f"{bits} bits per block": BlockBits(bits),
            f"{bits} bits per block and step": BlockBits(per_step),
        }
        for name, choice in choices.items():
            options = Options(bits=choice, exchange="two_phase", bucket_mb=MOST_MB)
            ranks = SimulatedRanks(size, options)
            off = square = 0.0
            sent = 0
            for step in steps:
                true = torch.cat([x.flatten(1) for x in step], 1).double().mean(0)
                off += float((_means(ranks, step) - true).square().sum())
                square += float(true.square().sum())
                used = ranks.stats.bits
                bits_now = choice.at(used) if isinstance(choice, BlockBits) else used
                sent += wire_bytes(numels, bits=bits_now, two_phase=True, ranks=size)
            result.append({
                "name": name, "bits": 8 * sent / sum(numels) / len(steps), "error": off / square,
            })  # fmt: skip
    return result


def measure_block_sizes(step: Step) -> list[dict[str, Any]]:
    """Compares sizes of blocks for widths per block, in two phases, at equal bytes.

    Returns:
        A row for each size and total that leave 2 bits or more for the codes: "block_size",
        "total" bits per element, the "budget" of the codes, and "error".
    """
    true = torch.cat([x.flatten(1) for x in step], 1).double().mean(0)
    numels, ranks = [x[0].numel() for x in step], len(step[0])
    result = []
    for total, size in itertools.product(TOTALS, BLOCK_SIZES):
        options = {"block_size": size, "max_bits": 16}
        least = Options(bits=BlockBits(2, **options), bucket_mb=MOST_MB)
        norms = 8 * wire_bytes_of(least, numels, ranks) / sum(numels) - 2
        if (budget := total - norms) >= 2:
            estimate = _ours(step, {"bits": BlockBits(budget, **options)})
            assert estimate is not None
            error = (estimate.mean.double() - true).square().sum() / true.square().sum()
            result.append({
                "block_size": size, "total": total, "budget": budget, "error": float(error),
            })  # fmt: skip
    return result


def _ours(step: Step, options: dict[str, Any]) -> Estimate | None:
    """Measures options on all tensors in one bucket; None if the lanes are too narrow."""
    numels, ranks = [x[0].numel() for x in step], len(step[0])
    chosen = Options(**options, bucket_mb=MOST_MB)
    try:
        mean = _means(SimulatedRanks(ranks, chosen), step)
    except ValueError:
        return None
    return Estimate(mean, 8 * wire_bytes_of(chosen, numels, ranks) / sum(numels))


def _means(ranks: SimulatedRanks, step: Step) -> Tensor:
    """The means of all parameters, flattened and concatenated."""
    rows = [[("", own.contiguous()) for own in rank] for rank in zip(*step, strict=True)]
    return torch.cat([mean.flatten() for mean in ranks.means(rows)])


def _taught(rival: Callable[[Tensor], Estimate], steps: Sequence[Step]) -> Estimate:
    """The estimate of the last step, after those of all steps before."""
    return [rival(torch.cat([x.flatten(1) for x in step], 1)) for step in steps][-1]


def _power(steps: Sequence[Step], rank: int) -> Estimate:
    """PowerSGD on each matrix; vectors are not compressed, as in the paper."""
    parts: list[Estimate] = []
    for i, x in enumerate(steps[-1]):
        matrix = (x.shape[1], math.prod(x.shape[2:]))
        if min(matrix) == 1:
            parts.append(Estimate(x.flatten(1).mean(0), 32))
            continue
        rival = rivals.PowerSgd(matrix, rank)
        parts.append([rival(step[i].flatten(1)) for step in steps][-1])
    mean = torch.cat([part.mean for part in parts])
    bits = sum(part.bits * part.mean.numel() for part in parts) / mean.numel()
    return Estimate(mean, bits)
