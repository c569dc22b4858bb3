"""Linear dithering: codes that can be added as integers.

Global-QSGD (arXiv 2305.18627), standard dithering on a norm M that all ranks share, per block:

    code        u = clip(floor(x * s / M + s + xi), 0, 2s)      so  E[u] = x * s / M + s
    mean        (sum of u - n * s) * M / (s * n)

In an Allreduce, lanes of b bits hold the sum of the codes of n ranks: s = floor((2^b - 1) / (2n)),
so that no lane overflows, whatever the input. In a two-phase exchange nothing is added in the
lanes, and s = 2^(b-1) - 1 for any number of ranks.

To nearest, xi is 1/2 for all elements: halves go up, of negative elements too. The code of an
element below M / (2s) is 0, and that of M is s.
"""

from __future__ import annotations

from hvd_gqsgd.codecs.base import Codec, CodeKind
from hvd_gqsgd.levels import levels_of

__all__ = ["LinearCodec", "NearestCodec", "levels_for"]


def levels_for(bits: int, ranks: int) -> int:
    """Levels a side that leave room for the sum of the codes of ``ranks`` ranks in a lane.

    Raises:
        ValueError: the lanes are too narrow for even one level; names the width that works.
    """
    levels = levels_of(bits, ranks)
    if levels < 1:
        needed = (2 * ranks).bit_length()
        raise ValueError(
            f"bits={bits} is too narrow for {ranks} ranks: a lane must hold the sum of "
            f"{ranks} codes from 0 to 2, so bits must be at least {needed}, or "
            "exchange='two_phase'"
        )
    return levels


class LinearCodec(Codec):
    """Codes from -s to s, in lanes that can be added."""

    kind = CodeKind.LINEAR

    @classmethod
    def levels_for(cls, bits: int, summands: int) -> int:
        """See the function ``levels_for``."""
        return levels_for(bits, summands)


class NearestCodec(LinearCodec):
    """The same codes, rounded to nearest in place of by dither; biased."""

    kind = CodeKind.NEAREST
