"""Every knob of the compressor, its check and its error text."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

from hvd_gqsgd.checks import check_choice, check_int, check_number
from hvd_gqsgd.codecs.bit_schedule import MAX_BITS, MIN_BITS, DynamicBits

__all__ = ["Options", "digest"]

# Part of what ranks compare: changes whenever the bytes on the wire change their meaning.
WIRE_VERSION = 2

# Fewer levels a side than that, and exchange="auto" goes for two phases.
ENOUGH_LEVELS = 7

DITHERS = ("linear", "exponential")
EXCHANGES = ("auto", "allreduce", "two_phase", "reduce_scatter")
NORMS = ("max", "l2")
EXPONENTIAL_BITS = (4, 8)


@dataclass(frozen=True)
class Options:
    """The options that all ranks must share; see ``GlobalQSGD`` for what each one does.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range, or does not go with another one.
    """

    bits: int | DynamicBits = 8
    dither: str = "linear"
    exchange: str = "auto"
    norm: str = "max"
    block_size: int | None = 1024
    correlated: bool = True
    seed: int = 0
    min_numel: int = 4096
    bucket_mb: float = 25

    def __post_init__(self) -> None:
        if not isinstance(self.bits, DynamicBits):
            check_int("bits", self.bits, MIN_BITS, MAX_BITS, "DynamicBits(...)")
        check_choice("dither", self.dither, DITHERS)
        check_choice("exchange", self.exchange, EXCHANGES)
        check_choice("norm", self.norm, NORMS)
        if self.dither == "exponential":
            if self.bits not in EXPONENTIAL_BITS:
                raise ValueError(f"bits must be 4 or 8 for dither='exponential', got {self.bits}")
            if self.exchange == "allreduce":
                raise ValueError(
                    "exchange must be 'two_phase' or 'auto' for dither='exponential', whose codes "
                    "cannot be added, got 'allreduce'"
                )
        if self.exchange == "reduce_scatter" and (self.dither, self.norm) != ("exponential", "max"):
            raise ValueError(
                "exchange='reduce_scatter' goes with dither='exponential' and norm='max', got "
                f"dither={self.dither!r} and norm={self.norm!r}"
            )
        if self.block_size is not None:
            check_int("block_size", self.block_size, 1, 2**31 - 1, "None (one norm per tensor)")
        if not isinstance(self.correlated, bool):
            raise TypeError(f"correlated must be True or False, got {self.correlated!r}")
        check_int("seed", self.seed, -(2**63), 2**63 - 1)
        check_int("min_numel", self.min_numel, 0, 2**63 - 1)
        bucket_mb = check_number("bucket_mb", self.bucket_mb, "a number of megabytes")
        if not 0 < bucket_mb <= 2048:
            raise ValueError(
                f"bucket_mb must be above 0 and at most 2048 megabytes, got {self.bucket_mb!r}"
            )
        object.__setattr__(self, "bucket_mb", bucket_mb)  # 25 and 25.0 are the same

    @property
    def least_bits(self) -> int:
        """The narrowest lanes that may come."""
        return self.bits.min_bits if isinstance(self.bits, DynamicBits) else self.bits

    @property
    def most_bits(self) -> int:
        """The widest lanes that may come."""
        return self.bits.max_bits if isinstance(self.bits, DynamicBits) else self.bits

    def exchange_for(self, world_size: int) -> str:
        """``"allreduce"``, ``"two_phase"`` or ``"reduce_scatter"``: the one asked for, or to take.

        Exponential codes cannot be added. Linear ones are, unless the lanes leave less than 7
        levels a side to the ranks, and more without a sum to hold.
        """
        if self.exchange != "auto":
            return self.exchange
        if self.dither == "exponential":
            return "two_phase"
        bits = int(self.bits.budget) if isinstance(self.bits, DynamicBits) else self.bits
        levels, of_one = (((1 << bits) - 1) // (2 * ranks) for ranks in (world_size, 1))
        return "two_phase" if levels < min(ENOUGH_LEVELS, of_one) else "allreduce"

    @property
    def bucket_bytes(self) -> int:
        """Gradient bytes after which a bucket is sent off."""
        return int(self.bucket_mb * 2**20)

    def digest(self) -> int:
        """31 bits that differ, but for one chance in 2^31, when any option does."""
        return digest(("options", WIRE_VERSION, *dataclasses.astuple(self)))


def digest(value: object) -> int:
    """A 31-bit digest of the ``repr`` of a value made of plain numbers, strings and tuples."""
    hashed = hashlib.blake2b(repr(value).encode(), digest_size=4).digest()
    return int.from_bytes(hashed, "little") >> 1
