"""The formulas of ``hvd_gqsgd/docs/THEORY.md``: errors and bytes of each operator, in NumPy.

An operator is given by the options of ``GlobalQSGD``. Its exchange is "allreduce" or, for
exponential dithering always, "two_phase", or "one_phase" for either; never "auto". Rows are the
gradients of the ranks, as ``linear.py`` takes them; results are float64, one number for each
element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from hvd_gqsgd.reference import linear

__all__ = ["Operator", "expected_variance", "rounding_variance", "sure_bound", "variance_bound",
           "wire_bytes"]  # fmt: skip

Array = linear.Array

TILE = 1024  # elements that an owner rounds on a norm of their own


class Operator(NamedTuple):
    """The options that errors depend on, with their defaults."""

    bits: int = 8
    dither: Literal["linear", "exponential"] = "linear"
    exchange: Literal["allreduce", "two_phase", "one_phase"] = "two_phase"
    norm: Literal["max", "l2"] = "max"
    block_size: int | None = 1024
    correlated: bool = True

    def levels(self, n: int) -> int:
        """s of linear dithering (sections 1 and 5)."""
        assert self.dither == "linear"
        if self.exchange != "allreduce":
            return 2 ** (self.bits - 1) - 1
        return (2**self.bits - 1) // (2 * n)

    def lowest(self) -> float:
        """L / M of exponential dithering: 2^-K (section 4)."""
        return 2.0 ** -{4: 6, 8: 126}[self.bits]

    def norms(self, rows: Array) -> Array:
        """M, or M_2 (section 3), of each element's block."""
        n, numel = rows.shape
        if self.exchange == "one_phase":  # blocks of each shard
            whole, length = self._replace(exchange="two_phase"), max(-(-numel // n), 1)
            shards = [rows[:, i : i + length] for i in range(0, numel, length)]
            return np.concatenate([np.zeros(0), *map(whole.norms, shards)])
        shared = linear.floats(linear.shared_norms(rows, self.block_size, self.norm))
        return np.repeat(shared.astype(np.float64), self.block_size or max(numel, 1))[:numel]


def rounding_variance(fractions: Array, correlated: bool) -> Array:
    """Var(N), in squared levels, where rank r is f_r above a level (sections 1 and 2).

    Rank r rounds up if U lies in an arc of the circle that ends at -r/n and is f_r long. N is the
    number of arcs over U: a step function, whose mean square is the sum over its steps.
    """
    n = len(fractions)
    if not correlated:
        return (fractions * (1 - fractions)).sum(0)
    ends = np.broadcast_to(((-np.arange(n) / n) % 1)[:, None], fractions.shape)
    begins = (ends - fractions) % 1
    places = np.concatenate([begins, ends])
    steps = np.concatenate([np.full(begins.shape, 1), np.full(ends.shape, -1)])
    order = np.argsort(places, axis=0)
    lengths = np.diff(np.take_along_axis(places, order, 0), axis=0, prepend=0, append=1)
    at_zero = (begins > ends).sum(0)[None]  # those that go on beyond 1
    changes = np.take_along_axis(steps, order, 0).cumsum(0)
    over = at_zero + np.concatenate([np.zeros_like(at_zero), changes])
    return (lengths * over**2).sum(0) - fractions.sum(0) ** 2


def expected_variance(rows: Array, operator: Operator) -> Array:
    """Var(m^) itself, for linear dithering in an Allreduce (sections 1 and 2)."""
    assert operator.exchange == "allreduce"
    n = len(rows)
    level = operator.norms(rows) / operator.levels(n)
    places = linear.widen(rows) / level
    return (level / n) ** 2 * rounding_variance(places - np.floor(places), operator.correlated)


def variance_bound(rows: Array, operator: Operator) -> Array:
    """The most that Var(m^) can be: the table at the top of the page."""
    n, x, norm = len(rows), linear.widen(rows).astype(np.float64), operator.norms(rows)
    mean = x.mean(0)
    if operator.dither == "linear":
        level = norm / operator.levels(n)
        first = level**2 * (1 / 12 + 1 / (6 * n**2) if operator.correlated else 1 / (4 * n))
        if operator.exchange != "two_phase":
            return first
        return first + _second_level(mean, level, norm, operator) ** 2 / 4
    lowest = norm * operator.lowest()
    each = np.where(abs(x) < lowest, abs(x) * (lowest - abs(x)), x**2 / 8)
    first = each.sum(0) / (n if operator.correlated else n**2)
    if operator.exchange == "one_phase":
        return first
    return first + (mean**2 + first) / 8 + lowest**2 / 4


def sure_bound(rows: Array, operator: Operator) -> Array:
    """What no error exceeds, but for the rounding of floats (sections 1, 4 and 5)."""
    n, x, norm = len(rows), linear.widen(rows).astype(np.float64), operator.norms(rows)
    mean = (x / n).sum(0)
    if operator.dither == "linear":
        level = norm / operator.levels(n)
        if operator.exchange != "two_phase":
            return level
        return level + _second_level(mean, level, norm, operator)
    lowest = norm * operator.lowest()
    first = np.maximum(abs(x) / n, lowest / n).sum(0)
    if operator.exchange == "one_phase":
        return first
    return first + np.maximum(abs(mean) + first, lowest)


def _second_level(mean: Array, level: Array, norm: Array, operator: Operator) -> Array:
    """R M / s of each element's tile, at most (section 5)."""
    tile = linear.places(len(mean), operator.block_size, operator.bits).tile
    largest = np.zeros(tile.max(initial=-1) + 1)
    np.maximum.at(largest, tile, abs(mean))
    return np.minimum(norm, largest[tile] + level) / operator.levels(1)


def wire_bytes(numels: Sequence[int], operator: Operator, n: int, double: bool = False) -> int:
    """Bytes of a bucket of tensors, of float64 if ``double``, without probes and passed turns ("On
    the wire")."""
    b, of_norm = operator.bits, 8 if double else 4
    of_word = 4 if 32 % b == 0 else 8
    lanes, p = 8 * of_word // b, max(of_norm, of_word)
    blocks = [part for numel in numels for part in _parts(numel, operator.block_size or numel)]
    tiles = [part for block in blocks for part in _parts(block, TILE)]
    words = [of_word * -(-tile // lanes) for tile in tiles]
    total = of_norm * (16 + len(blocks)) + (8 * len(blocks) if operator.norm == "l2" else 0)
    if operator.exchange == "allreduce":
        return total + 16 * of_word + sum(words)
    means = n * p + sum(p + p * -(-word // p) for word in words)
    return total + sum(words) // 2 + means // 2


def _parts(whole: int, most: int) -> list[int]:
    return [min(most, whole - begin) for begin in range(0, whole, max(most, 1))]
