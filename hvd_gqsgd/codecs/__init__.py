"""Gradients to codes and back. Codecs know no transport."""

from __future__ import annotations

from hvd_gqsgd.codecs.base import Codec
from hvd_gqsgd.codecs.exponential import ExponentialCodec
from hvd_gqsgd.codecs.linear import LinearCodec, levels_for

__all__ = ["Codec", "ExponentialCodec", "LinearCodec", "levels_for"]


def make_codec(options, bits, *, summands, rank, world_size):  # type: ignore
    cls = {"linear": LinearCodec, "exponential": ExponentialCodec}[options.dither]
    levels = 0 if options.dither == "exponential" else levels_for(bits, summands)
    return cls(bits, levels, options.block_size, options.correlated, options.seed, rank, world_size)
