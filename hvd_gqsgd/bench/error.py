"""The error of each operator against its bound: ``python -m hvd_gqsgd.bench.error [--markdown]``.

Formulas and proofs are in ``hvd_gqsgd/THEORY.md``, whose tables are printed here. Gradients are
heavy-tailed: independent numbers with Student's t distribution with 4 degrees of freedom. Nothing
is timed, and seeds are fixed, so that the tables are the same on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hvd_gqsgd import ops
from hvd_gqsgd.codecs import levels_for
from hvd_gqsgd.options import Options
from hvd_gqsgd.schedule import wire_bits
from hvd_gqsgd.simulate import simulate

__all__ = ["expected_variance", "main", "measure", "sure_bound", "variance_bound", "wire_bytes"]

TILE = ops.TILE
BUCKET = 25 * 2**20 // 4  # elements of float32 in a bucket of DistributedDataParallel

# What Global-QSGD's published code does for linear dithering: one largest magnitude M over the
# ranks for each bucket, x 127 / (n M) rounded up or down by each rank's own random numbers, int8.
# That is s = 127/n; here s = floor(255 / (2n)), so that no lane overflows.
AUTHORS: dict[str, Any] = {"block_size": None, "correlated": False}

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
        "the rest takes 2^17 at most",
    )  # fmt: skip
    parser.add_argument("--trials", type=int, default=8, help="steps (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the tables of THEORY.md")
    options = parser.parse_args(arguments)
    if not 2 <= options.ranks <= 127:
        parser.error(f"--ranks must be from 2 to 127, got {options.ranks}")
    for name in ("numel", "trials"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    result = measure(options.ranks, options.numel, options.trials)
    if options.json:
        print(json.dumps(result))
    else:
        (_show_markdown if options.markdown else _show)(_tables(result))


def measure(
    ranks: int = 4, numel: int = BUCKET, trials: int = 8, most: int = 2**17
) -> dict[str, Any]:
    """Measures everything.

    Args:
        ranks: n, from 2 to 127.
        numel: elements for the comparison with the authors' scheme.
        trials: steps to average over, where not so many elements are averaged over.
        most: elements, at most, for all else.

    Returns:
        Lists of rows under "comparison", "operators", "tight", "by_ranks" and "widths", and
        "ratio_to_authors", the error of the authors' scheme over that of the default.
    """
    rng = np.random.default_rng(0)
    large = _student(rng, ranks, numel)
    comparison = [_row(name, large, 1, options) for name, options in COMPARISON]
    first, default = (comparison[i]["relative_error"] for i in (0, 3))
    small = large[:, :most].contiguous()
    return {
        "ranks": ranks,
        "numel": numel,
        "trials": trials,
        "comparison": comparison,
        "ratio_to_authors": first / default,
        "operators": [
            _row(name, small, trials, options)
            for name, options in OPERATORS
            if "exchange" in options or "dither" in options or _fits(ranks, options)
        ],
        "tight": [case(trials) for case in _tight(rng, ranks)],
        "by_ranks": [_by_ranks(rng, n, trials) for n in (2, 4, 8, 16, 32, 64)],
        "widths": [_width(bits) for bits in range(2, 17)],
    }


# --- formulas ------------------------------------------------------------------------------------


def variance_bound(rows: Tensor, **options: Any) -> Tensor:
    """What the mean square of each element's error is at most: float64, of shape (d,)."""
    chosen, n = Options(**options), len(rows)
    norm, s = _norms(rows, chosen), _levels(chosen, n)
    x = rows.double()
    if s:
        step = norm / s
        first = step**2 * ((1 / 12 + 1 / (6 * n * n)) if chosen.correlated else 1 / (4 * n))
    else:
        lowest = norm * _lowest(chosen)
        each = torch.where(x.abs() < lowest, x.abs() * (lowest - x.abs()), x**2 / 8)
        first = each.sum(0) / (n if chosen.correlated else n * n)
    if chosen.exchange_for(n) == "allreduce":
        return first
    if s:
        return first + (_reach(x, norm, norm / s, chosen) / s) ** 2 / 4
    return first + (x.mean(0) ** 2 + first) / 8 + lowest**2 / 4


def sure_bound(rows: Tensor, **options: Any) -> Tensor:
    """What no error of an element exceeds but for rounding of floats: float64, of shape (d,)."""
    chosen, n = Options(**options), len(rows)
    norm, s = _norms(rows, chosen), _levels(chosen, n)
    x = rows.double() / n  # before the sum, which may overflow
    if s:
        first = norm / s
        second = _reach(x * n, norm, first, chosen) / s
    else:
        lowest = norm * _lowest(chosen)
        first = torch.maximum(x.abs(), lowest / n).sum(0)
        second = torch.maximum(x.sum(0).abs() + first, lowest)
    return first if chosen.exchange_for(n) == "allreduce" else first + second


def expected_variance(rows: Tensor, **options: Any) -> Tensor:
    """The mean square itself, for linear dithering in an Allreduce: float64, of shape (d,).

    A rank's f_r is how far it is above a level, in levels. It goes up if U is in an arc of the
    length f_r that ends at -r/n; two ranks do so if U is where their arcs overlap.
    """
    chosen, n = Options(**options), len(rows)
    norm, s = _norms(rows, chosen), _levels(chosen, n)
    places = rows.double() * s / norm
    f = places - places.floor()
    total = (f * (1 - f)).sum(0)
    for r in range(n if chosen.correlated else 0):
        for q in range(r):
            apart = (f[r] - f[q] + (r - q) / n) % 1  # from where r's arc begins to where q's does
            overlap = torch.minimum(f[r] - apart, f[q]).clamp(min=0)
            overlap += torch.minimum(f[q] - (1 - apart), f[r]).clamp(min=0)
            total += 2 * (overlap - f[r] * f[q])
    return total * (norm / (s * n)) ** 2


def wire_bytes(
    numels: Sequence[int], *, bits: int = 8, block_size: int | None = 1024,
    two_phase: bool = False, l2: bool = False, double: bool = False,
) -> int:  # fmt: skip
    """Bytes for a bucket of tensors as ``Stats`` counts them, without probes and passed turns.

    Args:
        numels: elements of each tensor.
        double: whether they are float64.
    """
    norm, word = 8 if double else 4, 4 if 32 % bits == 0 else 8
    lanes, unit = 8 * word // bits, max(norm, word)
    blocks = words = means = 0
    for numel in numels:
        block = block_size or max(numel, 1)
        sizes = [min(block, numel - i) for i in range(0, numel, block)]
        blocks += len(sizes)
        for size in sizes:
            for tile in (min(TILE, size - i) for i in range(0, size, TILE)):
                bytes_of_words = -(-tile // lanes) * word
                words += bytes_of_words
                means += unit + -(-bytes_of_words // unit) * unit
    total = norm * (16 + blocks) + (8 * blocks if l2 else 0)
    return total + (words // 2 + means // 2 if two_phase else 16 * word + words)


def _levels(options: Options, ranks: int) -> int:
    """s; 0 for exponential dithering."""
    if options.dither == "exponential":
        return 0
    in_lane = ranks if options.exchange_for(ranks) == "allreduce" else 1
    return levels_for(options.most_bits, in_lane)


def _lowest(options: Options) -> float:
    """The lowest level of exponential dithering, as a share of the norm."""
    return float(2.0 ** -(2 ** (options.most_bits - 1) - 2))


def _norms(rows: Tensor, options: Options) -> Tensor:
    """The norm of each element's block over all ranks: float64, of shape (d,)."""
    numel = rows.shape[1]
    block = options.block_size or max(numel, 1)
    norms = torch.zeros((len(rows), -(-numel // block)), dtype=ops.norm_dtype(rows.dtype))
    for x, out in zip(rows, norms, strict=True):
        ops.block_max(x, block, out)
    largest = norms.amax(0)
    if options.norm == "l2":
        squares = torch.zeros(norms.shape, dtype=torch.int64)
        for x, into in zip(rows, squares, strict=True):
            ops.block_squares(x, largest, into, block)
        ops.l2_norms(largest, squares.sum(0))
    real = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return largest.view(real).double().repeat_interleave(block)[:numel]


def _reach(x: Tensor, norm: Tensor, step: Tensor, options: Options) -> Tensor:
    """What R M of each element's tile is at most, if the first phase is off by a step at most."""
    numel = x.shape[1]
    mean = (x / len(x)).sum(0).abs()
    if not numel:
        return mean
    block = options.block_size or numel
    within = torch.arange(numel) % block
    tile = torch.arange(numel) // block * -(-block // TILE) + within // TILE
    largest = torch.zeros(int(tile[-1]) + 1, dtype=torch.float64)
    largest.scatter_reduce_(0, tile, mean, "amax")
    return torch.minimum(norm, largest[tile] + step)


# --- measurements --------------------------------------------------------------------------------


def _student(rng: np.random.Generator, ranks: int, numel: int) -> Tensor:
    return torch.from_numpy(rng.standard_t(4, (ranks, numel)).astype(np.float32))


def _fits(ranks: int, options: dict[str, Any]) -> bool:
    """Whether the lanes leave a level to the sum."""
    return (1 << options.get("bits", 8)) - 1 >= 2 * ranks


def _squares(rows: Tensor, trials: int, options: dict[str, Any]) -> Tensor:
    """The mean square of each element's error over some steps: float64, of shape (d,)."""
    exact = rows.double().mean(0)
    total = torch.zeros_like(exact)
    for step in range(trials):
        total += (simulate(rows, step=step, **options).double() - exact) ** 2
    return total / trials


def _row(name: str, rows: Tensor, trials: int, options: dict[str, Any]) -> dict[str, Any]:
    """An operator's levels, bits an element on the wire, error, and what theory says of it."""
    n, numel = rows.shape
    # "auto" is for users; the operator that is named here is the one to be measured.
    two_phase = "two_phase" in options.values() or "exponential" in options.values()
    options = {**options, "exchange": "two_phase" if two_phase else "allreduce"}
    chosen = Options(**options)
    squares = _squares(rows, trials, options).mean()
    expected = None if two_phase else expected_variance(rows, **options).mean()
    on_wire = wire_bytes(
        [numel], bits=chosen.most_bits, block_size=chosen.block_size, two_phase=two_phase,
        l2=chosen.norm == "l2",
    )  # fmt: skip
    return {
        "name": name,
        "options": options,
        "bits": chosen.most_bits,
        "levels": _levels(chosen, n) or None,
        "wire_bits": 8 * on_wire / numel,
        "relative_error": float((squares / rows.double().mean(0).square().mean()).sqrt()),
        "mean_square": float(squares),
        "to_expected": None if expected is None else float(squares / expected),
        "to_bound": float(squares / variance_bound(rows, **options).mean()),
    }


class _Tight(NamedTuple):
    """Data that reaches a bound, and the bound."""

    name: str
    formula: str
    rows: Tensor
    bound: float
    options: dict[str, Any]

    def __call__(self, trials: int) -> dict[str, Any]:
        # The first element of each block is there for the norm, and is exact.
        inner = torch.arange(self.rows.shape[1]) % self.options.get("block_size", 1024) > 0
        measured = float(_squares(self.rows, trials, self.options)[inner].mean())
        return {
            "name": self.name,
            "formula": self.formula,
            "ranks": len(self.rows),
            "mean_square": measured,
            "to_formula": measured / self.bound,
        }


def _tight(rng: np.random.Generator, n: int, numel: int = 2**15) -> list[_Tight]:
    """Cases for n ranks, or for as many as are named."""

    def blocks(shares: Sequence[float] | np.ndarray[Any, Any], top: float = 1) -> Tensor:
        rows = torch.tensor(shares, dtype=torch.float64)
        rows = rows[:, None].repeat(1, numel) if rows.dim() == 1 else rows
        rows[:, ::1024] = top
        return rows

    r = np.arange(n)
    s, one, two = levels_for(8, n), 127, {"exchange": "two_phase"}
    summed, wide = {"exchange": "allreduce"}, levels_for(16, n)
    alone: dict[str, Any] = {**summed, "correlated": False}
    exponential = {"dither": "exponential"}
    # f = 1/2 on a norm that the elements themselves are part of, n (1 + 1023 (M2 / 2s)^2)
    l2 = (n / (1 - n * 1023 / (4 * wide**2))) ** 0.5
    uniform = rng.uniform(-1, 1, (n, numel))
    return [
        _Tight("independent, half way", "(M/s)² / (4n)", blocks([0.5 / s] * n),
               1 / (4 * n * s**2), alone),
        _Tight("independent, uniform", "(M/s)² / (6n)", blocks(uniform), 1 / (6 * n * s**2), alone),
        _Tight("correlated, uniform", "(M/s)² (n+1) / (12n²)", blocks(uniform),
               (n + 1) / (12 * n**2 * s**2), summed),
        _Tight("correlated, equal ranks", "(M/s)² / (4n²)", blocks([0.5 / (n * s)] * n),
               1 / (4 * n**2 * s**2), summed),
        _Tight("correlated, worst data", "(M/s)² (1/12 + 1/(6n²))",
               blocks((0.5 / n - r / n) % 1 / s), (1 / 12 + 1 / (6 * n**2)) / s**2, summed),
        _Tight("l2, 16 bits, half way", "(M₂/s)² / (4n)", blocks([0.5 * l2 / wide] * n),
               (l2 / wide) ** 2 / (4 * n), {**alone, "bits": 16, "norm": "l2"}),
        _Tight("two-phase linear, phase 2", "(R M/s)² / 4", blocks([3 / one, 4 / one]),
               1 / (4 * one**2), {**two}),
        _Tight("exponential, phase 1", "x² / 8", blocks([1 / 12]), 1 / (12**2 * 8), exponential),
        _Tight("exponential, phase 2", "m² / 8", blocks([1 / 16, 1 / 16, 1 / 8]),
               1 / (12**2 * 8), exponential),
        _Tight("exponential, 4 bits, below all levels", "L² / 4", blocks([1 / 128]), 1 / 128**2,
               {**exponential, "bits": 4}),
    ]  # fmt: skip


def _by_ranks(rng: np.random.Generator, ranks: int, trials: int) -> dict[str, Any]:
    """Both exchanges at 8 bits, on independent ranks and on ranks that hold the same."""
    row: dict[str, Any] = {"ranks": ranks}
    different = _student(rng, ranks, 2**14)
    for kind, rows in (("different", different), ("equal", different[:1].repeat(ranks, 1))):
        for exchange in ("allreduce", "two_phase"):
            options = {"exchange": exchange}
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
        "wire_bits_of_a_tile": -(-TILE // lanes) * 8 * word / TILE,
    }


# --- tables --------------------------------------------------------------------------------------


class _Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]


def _tables(result: dict[str, Any]) -> list[_Table]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    n, default = result["ranks"], result["comparison"][3]["relative_error"]
    header = ["bits", "levels", "bits on the wire", "relative error"]

    def start(row: dict[str, Any]) -> list[str]:
        return [
            row["name"], str(row["bits"]), number(row["levels"], "d"),
            f"{row['wire_bits']:.3f}", f"{row['relative_error']:.5f}",
        ]  # fmt: skip

    theory = ["mean square / expected", "mean square / bound"]
    return [
        _Table(
            f"One tensor of {result['numel']:,} float32 on {n} ranks, one step, Allreduce",
            ["", *header, "times the default", *theory],
            [
                [*start(row), f"{row['relative_error'] / default:.2f}",
                 number(row["to_expected"], ".3f"), number(row["to_bound"], ".3f")]
                for row in result["comparison"]
            ],
        ),
        _Table(
            f"Operators on {n} ranks, {result['trials']} steps; blocks of 1024 and correlated "
            "dither but where it says otherwise",
            ["", *header, *theory],
            [
                [*start(row), number(row["to_expected"], ".3f"), number(row["to_bound"], ".3f")]
                for row in result["operators"]
            ],
        ),
        _Table(
            "Data that reaches the formula",
            ["", "ranks", "formula", "mean square / formula"],
            [
                [row["name"], str(row["ranks"]), row["formula"], f"{row['to_formula']:.3f}"]
                for row in result["tight"]
            ],
        ),
        _Table(
            "Relative error at 8 bits by the number of ranks",
            ["ranks", "levels: Allreduce", "two-phase", "independent ranks: Allreduce",
             "two-phase", "equal ranks: Allreduce", "two-phase"],
            [
                [str(row["ranks"]), str(row["allreduce_levels"]), str(row["two_phase_levels"])]
                + [f"{row[f'{exchange}_{kind}']:.4f}" for kind in ("different", "equal")
                   for exchange in ("allreduce", "two_phase")]
                for row in result["by_ranks"]
            ],
        ),
        _Table(
            "Lanes",
            ["width", "bytes of a word", "lanes", "bits on the wire", "in tiles of 1024"],
            [
                [str(row["bits"]), str(row["word_bytes"]), str(row["lanes"]),
                 f"{row['wire_bits']:.2f}", f"{row['wire_bits_of_a_tile']:.2f}"]
                for row in result["widths"]
            ],
        ),
    ]  # fmt: skip


def _show_markdown(tables: list[_Table]) -> None:
    for title, header, rows in tables:
        aligned = ["---" if i == 0 else "---:" for i in range(len(header))]
        print(f"{title}:\n")
        for row in [header, aligned, *rows]:
            print("|", " | ".join(row), "|")
        print()


def _show(tables: list[_Table]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _show_markdown(tables)
        return
    for title, header, rows in tables:
        table = Table(title=title, title_justify="left")
        for column, name in enumerate(header):
            table.add_column(name, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main()
