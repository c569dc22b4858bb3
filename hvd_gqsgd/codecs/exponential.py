"""Exponential dithering: codes of a sign and an exponent, which cannot be added.

Global-QSGD (arXiv 2305.18627), exponential dithering on a norm M that all ranks share, per block.
The levels are 0 and +-M * 2^-k, k = 0, 1, ..., 126 at 8 bits and 0, 1, ..., 6 at 4. An element
between two levels goes to the upper one with a probability that makes it right on average; its
variance is at most 1/8 of its square, however small it is.
"""

from __future__ import annotations

from hvd_gqsgd.codecs.base import Codec, CodeKind

__all__ = ["ExponentialCodec"]


class ExponentialCodec(Codec):
    """Codes of 4 or 8 bits."""

    kind = CodeKind.EXPONENTIAL
    widths = (4, 8)
    added = False

    @classmethod
    def levels_for(cls, bits: int, summands: int) -> int:
        """Levels a side: all that the exponent counts, as sums are codes again."""
        return (1 << bits - 1) - 1
