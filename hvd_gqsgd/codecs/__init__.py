"""Gradients to codes and back. Codecs know no transport."""

from __future__ import annotations

from hvd_gqsgd.codecs.base import Codec
from hvd_gqsgd.codecs.exponential import ExponentialCodec
from hvd_gqsgd.codecs.linear import LinearCodec, levels_for

__all__ = ["Codec", "ExponentialCodec", "LinearCodec", "levels_for"]
