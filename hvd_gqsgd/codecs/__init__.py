"""Gradients to codes and back. Codecs know no transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_gqsgd.codecs.base import Codec, CodeKind
from hvd_gqsgd.codecs.by_name import CODECS, register_codec
from hvd_gqsgd.codecs.exponential import ExponentialCodec
from hvd_gqsgd.codecs.linear import LinearCodec, NearestCodec, levels_for
from hvd_gqsgd.codecs.plain import PlainCodec
from hvd_gqsgd.codecs.support import (
    check_compressible,
    check_device,
    check_plain,
    check_unmasked,
    is_compressible,
)

if TYPE_CHECKING:
    from hvd_gqsgd.options import Options

__all__ = [
    "CODECS",
    "CodeKind",
    "Codec",
    "ExponentialCodec",
    "LinearCodec",
    "NearestCodec",
    "PlainCodec",
    "check_compressible",
    "check_device",
    "check_plain",
    "check_unmasked",
    "is_compressible",
    "levels_for",
    "make_codec",
    "register_codec",
]


def make_codec(options: Options, bits: int, *, summands: int, rank: int, world_size: int) -> Codec:
    """A rank's codec for lanes of ``bits`` bits that must hold the sum of ``summands`` codes.

    Raises:
        ValueError: the lanes are too narrow.
    """
    codec = NearestCodec if options.rounding == "nearest" else CODECS[options.dither]
    return codec(
        bits=bits,
        levels=codec.levels_for(bits, summands),
        block_size=options.block_size,
        correlated=options.correlated,
        seed=options.seed,
        rank=rank,
        world_size=world_size,
    )
