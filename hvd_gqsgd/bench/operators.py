"""Names of the operators and arms that benchmarks compare. Arms have no commas in their names."""

from __future__ import annotations

from typing import Any

from hvd_gqsgd.codecs.block_bits import BlockBits

__all__ = ["ARMS", "DDP_ARMS", "FP16", "FP32", "OPERATORS", "OURS"]

OPERATORS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "4 bits per block": {"bits": BlockBits(4)},
    "8 bits two-phase": {"bits": 8, "exchange": "two_phase"},
    "exponential": {"dither": "exponential"},
}
"""Options of ``GlobalQSGD``, by name."""

FP32, FP16 = "Horovod fp32", "Horovod fp16"
OURS = {f"GlobalQSGD {name}": options for name, options in OPERATORS.items()}
DDP_ARMS = ("DDP fp32", "DDP fp16", "DDP PowerSGD rank 4", "DDP GlobalQSGD 8 bits")

ARMS = (FP32, FP16, *OURS, *DDP_ARMS)
"""The arms of ``hvd-gqsgd bench step``."""
