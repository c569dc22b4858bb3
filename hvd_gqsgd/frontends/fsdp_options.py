"""The options of ``GlobalQSGD.fsdp``: those of gradients, and of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from hvd_gqsgd.checks import check_int
from hvd_gqsgd.codecs.bit_schedule import MAX_BITS, MIN_BITS
from hvd_gqsgd.options import Options

__all__ = ["ShardedOptions", "patterns"]


@dataclass(frozen=True)
class ShardedOptions(Options):
    """The options of a compressor, and of the weights that FSDP gathers.

    All ranks must use the same ones.

    Args:
        weight_bits: lane width of weights, from 2 to 16 bits per element; None: as they are.
        weight_exceptions: patterns of the names of parameters that go as they are.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or has no effect.
    """

    weight_bits: int | None = None
    weight_exceptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_bits is not None:
            none = " or None (weights as they are)"
            check_int("weight_bits", self.weight_bits, MIN_BITS, MAX_BITS, none)
        elif self.weight_exceptions:
            raise ValueError(
                f"weight_exceptions={self.weight_exceptions} has no effect with weight_bits=None, "
                "where all weights are gathered as they are: pass weight_bits=8, or leave it out"
            )

    @classmethod
    def of(
        cls, options: Options, weight_bits: int | None, exceptions: Iterable[str]
    ) -> ShardedOptions:
        """Adds those of weights to the options of gradients."""
        given = {f.name: getattr(options, f.name) for f in dataclasses.fields(Options)}
        return cls(**given, weight_bits=weight_bits, weight_exceptions=patterns(exceptions))

    @property
    def of_weights(self) -> Options:
        """The exchange of weights, in linear codes on the largest magnitudes of blocks.

        A rank rounds its own shard alone, so that there is no error for correlated dither to
        cancel.
        """
        assert self.weight_bits is not None
        return Options(
            bits=self.weight_bits, exchange="gather", block_size=self.block_size, correlated=False,
            seed=self.seed, min_numel=self.min_numel,
        )  # fmt: skip


def patterns(given: Iterable[str]) -> tuple[str, ...]:
    """Patterns of names in one order, whichever they were given in.

    Raises:
        TypeError: it is a string, or not of strings.
    """
    each = None if isinstance(given, str) or not isinstance(given, Iterable) else [*given]
    if each is None or not all(isinstance(pattern, str) for pattern in each):
        raise TypeError(
            "weight_exceptions must be a sequence of patterns of parameters' names, as "
            f"('*norm*', 'head.weight'), got {given!r}"
        )
    return tuple(sorted(set(each)))
