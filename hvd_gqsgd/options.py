"""Every knob of the compressor, its check and its error text."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

MIN_BITS, MAX_BITS = 2, 16

# Part of what ranks compare: changes whenever the bytes on the wire change their meaning.
WIRE_VERSION = 1


@dataclass(frozen=True)
class Options:
    """The options that all ranks must share; see ``GlobalQSGD`` for what each one does.

    Raises:
        TypeError: an option is of the wrong type.
        ValueError: an option is out of range.
    """

    bits: int = 8
    block_size: int | None = 1024
    correlated: bool = True
    seed: int = 0
    min_numel: int = 4096
    bucket_mb: float = 25

    def __post_init__(self) -> None:
        _check_int("bits", self.bits, MIN_BITS, MAX_BITS)
        if self.block_size is not None:
            _check_int("block_size", self.block_size, 1, 2**31 - 1, "None (one norm per tensor)")
        if not isinstance(self.correlated, bool):
            raise TypeError(f"correlated must be True or False, got {self.correlated!r}")
        _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_int("min_numel", self.min_numel, 0, 2**63 - 1)
        if isinstance(self.bucket_mb, bool) or not isinstance(self.bucket_mb, int | float):
            raise TypeError(f"bucket_mb must be a number of megabytes, got {self.bucket_mb!r}")
        object.__setattr__(self, "bucket_mb", float(self.bucket_mb))  # 25 and 25.0 are the same
        if not 0 < self.bucket_mb <= 2048:
            raise ValueError(
                f"bucket_mb must be above 0 and at most 2048 megabytes, got {self.bucket_mb!r}"
            )

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


def _check_int(name: str, value: object, low: int, high: int, also: str = "") -> None:
    alternative = f" or {also}" if also else ""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int{alternative}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}{alternative}, got {value}")
