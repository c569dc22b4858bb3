"""Other compressors, by their published formulas, to compare errors of means at equal bytes.

Each takes the gradients of all ranks, float32 of shape (ranks, elements), and returns the mean that
every rank decodes, in float32, and the bits on the wire per element. Bits are counted relative to a
ring Allreduce, which sends each element twice: two phases send it once as a code of a rank, and
once as a code of the mean.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MXFP4", "MXFP8", "Estimate", "Float", "IntSgd", "PowerSgd", "fp16", "mx", "qgz"]


class Estimate(NamedTuple):
    """A decoded mean."""

    mean: Tensor
    """The mean, float32 of shape (elements,)."""
    bits: float
    """Bits on the wire per element."""


def fp16(rows: Tensor) -> Estimate:
    """Float16 on the wire and in the sum, as ``hvd.Compression.fp16``."""
    total = rows[0].half()
    for row in rows[1:]:
        total = total + row.half()
    return Estimate(total.float() / len(rows), 16)


class Float(NamedTuple):
    """A small floating-point format."""

    mantissa: int
    """Bits after the binary point."""
    least_exponent: int
    """Least exponent of normal numbers."""
    largest_exponent: int
    largest: float
    bits: int

    def round(self, x: Tensor) -> Tensor:
        """The nearest numbers of the format, ties to even; larger ones become the largest."""
        exponent = torch.frexp(x).exponent - 1
        step = torch.ldexp(
            torch.ones_like(x), exponent.clamp(min=self.least_exponent) - self.mantissa
        )
        rounded: Tensor = (x / step).round() * step
        return rounded.clamp(-self.largest, self.largest)


MXFP8 = Float(mantissa=3, least_exponent=-6, largest_exponent=8, largest=448, bits=8)
"""E4M3 elements of the Open Compute Project's Microscaling (MX) formats, version 1.0."""

MXFP4 = Float(mantissa=1, least_exponent=0, largest_exponent=2, largest=6, bits=4)
"""E2M1 elements of the same specification."""

MX_BLOCK = 32
MX_SCALE_BITS = 8


def mx(rows: Tensor, element: Float) -> Estimate:
    """An MX format in two phases: blocks of 32 elements on a shared scale, which is a power of two.

    The scale is 2^(e - largest_exponent), with e the exponent of the block's largest magnitude
    (section 6.3 of the specification).
    """

    def encoded(x: Tensor) -> Tensor:
        blocks = _blocks(x, MX_BLOCK)
        largest = blocks.abs().amax(-1, keepdim=True)
        exponent = (torch.frexp(largest).exponent - 1).clamp(min=-126)
        scale = torch.ldexp(torch.ones_like(largest), exponent - element.largest_exponent)
        return (element.round(blocks / scale) * scale).flatten(-2)[..., : x.shape[-1]]

    return Estimate(encoded(encoded(rows).mean(0)), element.bits + MX_SCALE_BITS / MX_BLOCK)


def qgz(rows: Tensor, node: int, bits: int = 4, group: int = 512) -> Estimate:
    """ZeRO++'s quantized gradients (qgZ, arXiv 2306.10209, section 3.3), and an Allgather.

    A first Alltoall within each node sends codes on the scale of each group, rounded to nearest. A
    second one between nodes sends the means of nodes, rounded again. ZeRO++ leaves the result on
    its owner; here an Allgather of the same codes distributes it.

    Args:
        rows: the gradients.
        node: ranks of a node, which divide the number of ranks.
        bits: width of a code.
        group: elements on one scale, which is a float32.
    """
    most = 2 ** (bits - 1) - 1

    def encoded(x: Tensor) -> Tensor:
        groups = _blocks(x, group)
        scale = groups.abs().amax(-1, keepdim=True) / most
        codes = torch.where(scale > 0, groups / scale, torch.zeros(())).round()
        decoded: Tensor = codes * scale
        return decoded.flatten(-2)[..., : x.shape[-1]]

    each = bits + 32 / group
    means = encoded(rows).view(-1, node, rows.shape[1]).mean(1)
    if len(means) > 1:
        # Each rank of a node sends its part of the node's mean, as codes again.
        means, hops = encoded(means), 2 + 1 / node
    else:
        hops = 2.0
    return Estimate(encoded(means.mean(0)), each * hops / 2)


class IntSgd:
    """IntSGD (arXiv 2102.08374): integers on a scale that follows from earlier steps.

    Algorithm 1, for steps x_{k+1} = x_k - eta g_k: a rank sends
    round(alpha x) with stochastic rounding, clipped so that the sum of all ranks fits its type;
    alpha = sqrt(d) / sqrt(2 n r / eta^2 + eps^2), and r is the moving average of
    ||x_k - x_{k-1}||^2. With the estimate's own steps r / eta^2 is that of ||g||^2. The first step
    is exact, as in the paper.
    """

    def __init__(self, bits: int = 8, beta: float = 0.9, eps: float = 1e-8, seed: int = 0) -> None:
        self.clipped = 0.0
        """Share of elements that the last call clipped."""
        self._bits, self._beta, self._eps = bits, beta, eps
        self._average: float | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: Tensor) -> Estimate:
        """The mean of a step's gradients."""
        ranks, elements = rows.shape
        if self._average is None:
            mean, bits = rows.mean(0), 32
        else:
            alpha = math.sqrt(elements / (2 * ranks * self._average + self._eps**2))
            most = (2 ** (self._bits - 1) - 1) // ranks
            dither = torch.rand(rows.shape, generator=self._generator)
            codes = (rows * alpha + dither).floor()
            self.clipped = float((codes.abs() > most).float().mean())
            mean, bits = codes.clamp(-most, most).sum(0) / (ranks * alpha), self._bits
        square = float(mean.double().square().sum())
        before = square if self._average is None else self._average
        self._average = self._beta * before + (1 - self._beta) * square
        return Estimate(mean, bits)


class PowerSgd:
    """PowerSGD (arXiv 1905.13727, algorithm 1): one step of subspace iteration on a matrix.

    Args:
        shape: of the gradient as a matrix.
        rank: columns of the factors.
        seed: of the first factor.
        feedback: whether the error of a mean is added to the next one (algorithm 2). If not, the
            error of one mean is measured.
    """

    def __init__(
        self, shape: tuple[int, int], rank: int, seed: int = 0, feedback: bool = False
    ) -> None:
        self._shape, self._rank = shape, min(rank, *shape)
        # Of the mean: both factors are linear in the gradients.
        self._error = torch.zeros(shape) if feedback else None
        generator = torch.Generator().manual_seed(seed)
        self._q = torch.randn(shape[1], self._rank, generator=generator)

    def __call__(self, rows: Tensor) -> Estimate:
        """The mean of a step's gradients; the factor is kept for the next step."""
        mean = rows.mean(0).view(self._shape)
        if self._error is not None:
            mean = mean + self._error
        p, _ = torch.linalg.qr(mean @ self._q)
        self._q = mean.T @ p
        decoded = p @ self._q.T
        if self._error is not None:
            self._error = mean - decoded
        m, n = self._shape
        return Estimate(decoded.flatten(), 32 * self._rank * (m + n) / (m * n))


def _blocks(x: Tensor, size: int) -> Tensor:
    """Splits the last dimension in blocks, padded with zeros."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return padded.view(*padded.shape[:-1], -1, size)
