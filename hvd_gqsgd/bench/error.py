"""Compares errors with their bounds: ``python -m hvd_gqsgd.bench.error [--markdown]``.

``hvd_gqsgd/docs/THEORY.md`` has the formulas, the proofs, and these tables. Gradients are
heavy-tailed: independent numbers with Student's t distribution with 4 degrees of freedom. Seeds are
fixed and nothing is timed, so the tables are the same on every machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd.bench.block_bits import block_norms, levels_of_elements
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.bench.wire import wire_bytes, wire_bytes_of
from hvd_gqsgd.codecs import levels_for
from hvd_gqsgd.codecs.bit_schedule import wire_bits
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import simulate

__all__ = [
    "expected_variance",
    "main",
    "measure",
    "student",
    "variance_bound",
    "wire_bytes",
    "wire_bytes_of",
]

TILE = layout.TILE
BUCKET = 25 * 2**20 // 4  # elements of float32 in a bucket of DistributedDataParallel

# Global-QSGD's published code: one M over the ranks for each bucket, x 127 / (n M) rounded by each
# rank's own random numbers. That is s = 127/n; here s = floor(255 / (2n)), and nothing overflows.
AUTHORS: dict[str, Any] = {"exchange": "allreduce", "block_size": None, "correlated": False}

COMPARISON: list[tuple[str, dict[str, Any]]] = [
    ("authors' scheme: tensor norm, independent", AUTHORS),
    ("tensor norm, correlated", {"block_size": None}),
    ("blocks of 1024, independent", {"correlated": False}),
    ("blocks of 1024, correlated: the default", {}),
    ("blocks of 256, correlated", {"block_size": 256}),
]
OPERATORS: list[tuple[str, dict[str, Any]]] = [
    ("linear, independent, tensor norm", AUTHORS),
    ("linear, independent", {"correlated": False}),
    ("linear", {}),
    ("linear, blocks of 256", {"block_size": 256}),
    ("linear, l2", {"norm": "l2"}),
    ("linear", {"bits": 4}),
    ("linear", {"bits": 12}),
    ("linear", {"bits": 16}),
    ("two-phase linear, independent", {"exchange": "two_phase", "correlated": False}),
    ("two-phase linear", {"exchange": "two_phase"}),
    ("two-phase linear, l2", {"exchange": "two_phase", "norm": "l2"}),
    ("two-phase linear", {"exchange": "two_phase", "bits": 4}),
    ("two-phase, widths per block", {"exchange": "two_phase", "bits": BlockBits(4)}),
    ("exponential, independent", {"dither": "exponential", "correlated": False}),
    ("exponential", {"dither": "exponential"}),
    ("exponential, tensor norm", {"dither": "exponential", "block_size": None}),
    ("exponential, l2", {"dither": "exponential", "norm": "l2"}),
    ("exponential", {"dither": "exponential", "bits": 4}),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m hvd_gqsgd.bench.error",
        description="Compares the error of each operator with its bound.",
    )
    parser.add_argument("--ranks", type=int, default=4, help="2 to 127 (default: %(default)s)")
    parser.add_argument(
        "--numel", type=int, default=BUCKET,
        help="elements for the comparison with the authors' scheme (default: %(default)s, 25 MB); "
        "all else uses 2^17 at most",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=8, help="steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the tables of THEORY.md")
    options = parser.parse_args(arguments)
    if not 2 <= options.ranks <= 127:
        parser.error(f"--ranks must be from 2 to 127, got {options.ranks}")
    if min(options.numel, options.trials) < 1:
        parser.error(
            f"--numel and --trials must be at least 1, got {options.numel} and {options.trials}"
        )
    result = measure(options.ranks, options.numel, options.trials)
    if options.json:
        print(json.dumps(result))
    else:
        _show(result, options.markdown)


def measure(
    ranks: int = 4, numel: int = BUCKET, trials: int = 8, most: int = 2**17
) -> dict[str, Any]:
    """Measures all tables.

    Args:
        ranks: n, from 2 to 127.
        numel: elements for the comparison with the authors' scheme.
        trials: steps to average over, except in the comparison.
        most: most elements outside the comparison.

    Returns:
        Lists of rows under "comparison", "operators", "tight", "by_ranks" and "widths", and
        "ratio_to_authors", the error of the authors' scheme over that of the default.
    """
    rng = np.random.default_rng(0)
    large = student(rng, ranks, numel)
    comparison = [_row(name, large, 1, options) for name, options in COMPARISON]
    for row in comparison:
        row["to_default"] = row["relative_error"] / comparison[3]["relative_error"]
    small = large[:, :most].contiguous()
    return {
        "ranks": ranks,
        "numel": numel,
        "trials": trials,
        "comparison": comparison,
        "ratio_to_authors": comparison[0]["to_default"],
        "operators": [
            _row(name, small, trials, options)
            for name, options in OPERATORS
            if _two_phase(options) or (1 << options.get("bits", 8)) - 1 >= 2 * ranks
        ],
        "tight": _tight(rng, ranks, trials),
        "by_ranks": [_by_ranks(rng, n, trials) for n in (2, 4, 8, 16, 32, 64)],
        "widths": [_width(bits) for bits in range(2, 17)],
    }


# --- formulas ------------------------------------------------------------------------------------


def variance_bound(rows: Tensor, **options: Any) -> Tensor:
    """Upper bound of each element's mean squared error: float64, of shape (d,)."""
    chosen, n = Options(**options), len(rows)
    norm, x, s = _norms(rows, chosen), rows.double(), _levels_of(rows, chosen)
    if s is not None:
        step = norm / s
        first = step**2 * ((1 / 12 + 1 / (6 * n * n)) if chosen.correlated else 1 / (4 * n))
    else:
        lowest = norm * _lowest(chosen)
        each = torch.where(x.abs() < lowest, x.abs() * (lowest - x.abs()), x**2 / 8)
        first = each.sum(0) / (n if chosen.correlated else n * n)
    if chosen.exchange_for(n) == "allreduce":
        return first
    if s is not None:
        return first + (_reach(x, norm, norm / s, chosen) / s) ** 2 / 4
    return first + (x.mean(0) ** 2 + first) / 8 + lowest**2 / 4


def expected_variance(rows: Tensor, **options: Any) -> Tensor:
    """Each element's mean squared error, for linear dithering in an Allreduce: float64, (d,).

    A rank is f_r levels above the level below it. It rounds up if U is in an arc of length f_r that
    ends at -r/n; two ranks both round up if U is where their arcs overlap.
    """
    chosen, n = Options(**options), len(rows)
    norm, s = _norms(rows, chosen), _levels(chosen, n)
    places = rows.double() * s / norm
    f = places - places.floor()
    total = (f * (1 - f)).sum(0)
    for q, r in itertools.combinations(range(n if chosen.correlated else 0), 2):
        apart = (f[r] - f[q] + (r - q) / n) % 1  # from where r's arc begins to where q's does
        overlap = torch.minimum(f[r] - apart, f[q]).clamp(min=0)
        overlap += torch.minimum(f[q] - (1 - apart), f[r]).clamp(min=0)
        total += 2 * (overlap - f[r] * f[q])
    return total * (norm / (s * n)) ** 2


def _levels(options: Options, ranks: int) -> int:
    """Levels a side; 0 for exponential dithering."""
    if options.dither == "exponential":
        return 0
    return levels_for(options.most_bits, _summands(options, ranks))


def _summands(options: Options, ranks: int) -> int:
    """Number of codes that a lane must be able to sum."""
    return ranks if options.exchange_for(ranks) == "allreduce" else 1


def _levels_of(rows: Tensor, options: Options) -> Tensor | int | None:
    """Levels a side, of each element where blocks differ; None for exponential dithering."""
    n, bits = len(rows), options.bits
    if isinstance(bits, BlockBits):
        norms, summands = block_norms(rows, options), _summands(options, n)
        return levels_of_elements(norms, rows.shape[1], bits, n, summands)
    return _levels(options, n) or None


def _lowest(options: Options) -> float:
    """The lowest level of exponential dithering, as a share of the norm."""
    return float(2.0 ** -(2 ** (options.most_bits - 1) - 2))


def _norms(rows: Tensor, options: Options) -> Tensor:
    """The norm of each element's block over all ranks: float64, of shape (d,)."""
    numel = rows.shape[1]
    real = torch.float64 if rows.dtype == torch.float64 else torch.float32
    norms = block_norms(rows, options).view(real).double()
    return norms.repeat_interleave(options.block_size or max(numel, 1))[:numel]


def _reach(x: Tensor, norm: Tensor, step: Tensor, options: Options) -> Tensor:
    """Upper bound of R M of each element's tile, for an error of the first phase up to a step."""
    numel = x.shape[1]
    mean = (x / len(x)).sum(0).abs()
    block = options.block_size or max(numel, 1)
    within = torch.arange(numel) % block
    tile = torch.arange(numel) // block * -(-block // TILE) + within // TILE
    largest = torch.zeros(int(tile.max()) + 1 if numel else 0, dtype=torch.float64)
    largest.scatter_reduce_(0, tile, mean, "amax")
    return torch.minimum(norm, largest[tile] + step)


# --- measurements --------------------------------------------------------------------------------


def student(rng: np.random.Generator, ranks: int, numel: int) -> Tensor:
    """Heavy-tailed gradients of shape (ranks, numel); float32."""
    return torch.from_numpy(rng.standard_t(4, (ranks, numel)).astype(np.float32))


def _two_phase(options: dict[str, Any]) -> bool:
    return "two_phase" in options.values() or "exponential" in options.values()


def _squares(rows: Tensor, trials: int, options: dict[str, Any]) -> Tensor:
    """The mean square of each element's error over some steps: float64, of shape (d,)."""
    exact = rows.double().mean(0)
    total = torch.zeros_like(exact)
    for step in range(trials):
        total += (simulate(rows, step=step, **options).double() - exact) ** 2
    return total / trials


def _row(name: str, rows: Tensor, trials: int, options: dict[str, Any]) -> dict[str, Any]:
    """An operator's levels, bits per element on the wire, and error, also relative to theory."""
    n, numel = rows.shape
    two_phase = _two_phase(options)
    # Not "auto", which would choose another exchange for some numbers of ranks.
    options = {**options, "exchange": "two_phase" if two_phase else "allreduce"}
    chosen = Options(**options)
    squares = _squares(rows, trials, options).mean()
    expected = None if two_phase else expected_variance(rows, **options).mean()
    bits, on_wire = chosen.bits, wire_bytes_of(chosen, [numel], n)
    return {
        "name": name,
        "bits": chosen.most_bits,
        "levels": (isinstance(bits, int) and _levels(chosen, n)) or None,
        "wire_bits": 8 * on_wire / numel,
        "relative_error": float((squares / rows.double().mean(0).square().mean()).sqrt()),
        "mean_square": float(squares),
        "to_expected": None if expected is None else float(squares / expected),
        "to_bound": float(squares / variance_bound(rows, **options).mean()),
    }


def _tight(rng: np.random.Generator, n: int, trials: int) -> list[dict[str, Any]]:
    """Errors on data for which a formula is exact, on n ranks or fewer."""
    numel = 2**15

    def case(name: str, formula: str, shares: Any, bound: float, options: Any) -> dict[str, Any]:
        rows = torch.as_tensor(shares, dtype=torch.float64)
        rows = rows[:, None].repeat(1, numel) if rows.dim() == 1 else rows.clone()
        first = torch.arange(numel) % 1024 == 0
        rows[:, first] = 1  # M, which is exact
        measured = float(_squares(rows, trials, options)[~first].mean())
        ratio = measured / bound
        return {"name": name, "formula": formula, "ranks": len(rows), "to_formula": ratio}

    s, wide, one = levels_for(8, n), levels_for(16, n), levels_for(8, 1)
    summed: dict[str, Any] = {"exchange": "allreduce"}
    alone, exponential = {**summed, "correlated": False}, {"dither": "exponential"}
    # f = 1/2 on a norm that the elements themselves are part of, n (1 + 1023 (M2 / 2s)^2)
    l2 = (n / (1 - n * 1023 / (4 * wide**2))) ** 0.5
    uniform = rng.uniform(-1, 1, (n, numel))
    return [
        case("independent, half way", "(M/s)² / (4n)", [0.5 / s] * n, 1 / (4 * n * s**2), alone),
        case("independent, uniform", "(M/s)² / (6n)", uniform, 1 / (6 * n * s**2), alone),
        case("correlated, uniform", "(M/s)² (n+1) / (12n²)", uniform,
             (n + 1) / (12 * n**2 * s**2), summed),
        case("correlated, equal ranks", "(M/s)² / (4n²)", [0.5 / (n * s)] * n,
             1 / (4 * n**2 * s**2), summed),
        case("correlated, worst data", "(M/s)² (1/12 + 1/(6n²))",
             (0.5 - np.arange(n)) / n % 1 / s, (1 / 12 + 1 / (6 * n**2)) / s**2, summed),
        case("l2, 16 bits, half way", "(M₂/s)² / (4n)", [0.5 * l2 / wide] * n,
             (l2 / wide) ** 2 / (4 * n), {**alone, "bits": 16, "norm": "l2"}),
        case("two-phase linear, phase 2", "(R M/s)² / 4", [3 / one, 4 / one],
             1 / (4 * one**2), {"exchange": "two_phase"}),
        case("exponential, phase 2", "m² / 8", [1 / 16, 1 / 16, 1 / 8], 1 / (12**2 * 8),
             exponential),
        case("exponential, 4 bits, below all levels", "L² / 4", [0, 1 / 64], 1 / 128**2,
             {**exponential, "bits": 4}),
    ]  # fmt: skip


def _by_ranks(rng: np.random.Generator, ranks: int, trials: int) -> dict[str, Any]:
    """Errors of both exchanges at 8 bits, for independent ranks and for equal ranks."""
    row: dict[str, Any] = {"ranks": ranks}
    different = student(rng, ranks, 2**14)
    for kind, rows in (("different", different), ("equal", different[:1].repeat(ranks, 1))):
        for exchange in ("allreduce", "two_phase"):
            options: dict[str, Any] = {"exchange": exchange}
            row[f"{exchange}_levels"] = _levels(Options(**options), ranks)
            row[f"{exchange}_{kind}"] = _row("", rows, trials, options)["relative_error"]
    return row


def _width(bits: int) -> dict[str, Any]:
    word = 4 if 32 % bits == 0 else 8
    lanes = 8 * word // bits
    return {
        "bits": bits,
        "word_bytes": word,
        "lanes": lanes,
        "wire_bits": wire_bits(bits),
        "bits_in_tiles": -(-TILE // lanes) * 8 * word / TILE,
    }


# --- tables --------------------------------------------------------------------------------------

Columns = list[tuple[str, str, str]]  # title, key of a row, format
OPERATOR: Columns = [
    ("", "name", ""), ("bits", "bits", ""), ("levels", "levels", ""),
    ("bits on the wire", "wire_bits", ".3f"), ("relative error", "relative_error", ".5f"),
    ("mean square / expected", "to_expected", ".3f"), ("mean square / bound", "to_bound", ".3f"),
]  # fmt: skip
TABLES: list[tuple[str, str, Columns]] = [
    ("comparison", "One tensor of {numel:,} float32 on {ranks} ranks, one step, Allreduce",
     [*OPERATOR, ("times the default", "to_default", ".2f")]),
    ("operators", "Operators on {ranks} ranks, {trials} steps; blocks of 1024 and correlated dither"
     " unless stated otherwise", OPERATOR),
    ("tight", "Data for which the formula is exact",
     [("", "name", ""), ("ranks", "ranks", ""), ("formula", "formula", ""),
      ("mean square / formula", "to_formula", ".3f")]),
    ("by_ranks", "Relative error at 8 bits by the number of ranks",
     [("ranks", "ranks", ""), ("levels: Allreduce", "allreduce_levels", ""),
      ("two-phase", "two_phase_levels", ""),
      ("independent ranks: Allreduce", "allreduce_different", ".4f"),
      ("two-phase", "two_phase_different", ".4f"),
      ("equal ranks: Allreduce", "allreduce_equal", ".4f"),
      ("two-phase", "two_phase_equal", ".4f")]),
    ("widths", "Lanes",
     [("width", "bits", ""), ("bytes of a word", "word_bytes", ""), ("lanes", "lanes", ""),
      ("bits on the wire", "wire_bits", ".2f"), ("in tiles of 1024", "bits_in_tiles", ".2f")]),
]  # fmt: skip


def _show(result: dict[str, Any], markdown: bool) -> None:
    for key, title, columns in TABLES:
        title = title.format(**result)
        header = [name for name, _, _ in columns]
        cells = [
            ["" if row[field] is None else format(row[field], form) for _, field, form in columns]
            for row in result[key]
        ]
        show_table(header, cells, title=title, markdown=markdown)
        if markdown:
            print()


if __name__ == "__main__":
    main()
