"""The codec of each value of the option ``dither``, and the registration of others."""

from __future__ import annotations

import inspect
from typing import NewType

from hvd_gqsgd.codecs.base import Codec
from hvd_gqsgd.codecs.exponential import ExponentialCodec
from hvd_gqsgd.codecs.linear import LinearCodec

__all__ = ["CODECS", "Registered", "register_codec"]

CODECS: dict[str, type[Codec]] = {
    "linear": LinearCodec,
    "exponential": ExponentialCodec,
}
"""The class for each value of the option ``dither``."""

_OWN = tuple(CODECS)

Registered = NewType("Registered", str)
"""The name of a codec from outside of this package."""


def register_codec(name: str, codec: type[Codec]) -> Registered:
    """Makes a codec a value of the option ``dither``.

    All ranks must register the same codec before the first use of ``dither=name``. Registering a
    name again replaces its codec, as when a cell of a notebook runs again.

    Args:
        name: the value.
        codec: a subclass of :class:`Codec`, such as one of :class:`PlainCodec`.

    Returns:
        The name, with a type that type checkers accept for ``dither``.

    Raises:
        TypeError: ``name`` is not a string, or ``codec`` is not a class of codecs without abstract
            methods.
        ValueError: the name belongs to a codec of this package.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a codec must be a string, got {name!r}")
    if name in _OWN:
        raise ValueError(f"the name of a codec must not be one of {_OWN}, got {name!r}")
    if not (isinstance(codec, type) and issubclass(codec, Codec)):
        raise TypeError(f"codec must be a subclass of Codec, got {codec!r}")
    if inspect.isabstract(codec):
        missing = ", ".join(sorted(codec.__abstractmethods__))
        raise TypeError(f"codec {codec.__name__} must define {missing}")
    CODECS[name] = codec
    return Registered(name)
