"""Names of the operators and arms that benchmarks compare. Arms have no commas in their names."""

from __future__ import annotations

from typing import Any

from hvd_gqsgd.codecs.block_bits import BlockBits

__all__ = [
    "ARMS",
    "AUTO",
    "AUTO_DDP",
    "DDP_ARMS",
    "FLAT",
    "FLAT_OF_AUTO",
    "FP16",
    "FP32",
    "FSDP_ARMS",
    "FSDP_BF16",
    "FSDP_FP32",
    "FSDP_OURS",
    "KEPT",
    "OF_AUTO",
    "OPERATORS",
    "OURS",
]

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
FLAT = {
    f"GlobalQSGD {name} flat": options | {"hierarchy": "flat"}
    for name, options in (OPERATORS | {"16 bits": {"bits": 16}}).items()
    if name != "exponential"
}
"""Options of arms that are flat on nodes of several ranks, where those above go by node."""
AUTO, AUTO_DDP = "GlobalQSGD auto", "DDP GlobalQSGD auto"
KEPT: dict[str, dict[str, Any]] = {
    "GlobalQSGD 1/64 at random": {"keep": 1 / 64},
    "GlobalQSGD 1/64 as a permutation": {"keep": 1 / 64, "select": "permutation"},
    "GlobalQSGD 1/64 by a leader": {"keep": 1 / 64, "select": "leader"},
    "GlobalQSGD 1/64 as a permutation, MARINA": {
        "keep": 1 / 64, "select": "permutation", "error_feedback": "marina",
    },
}  # fmt: skip
"""A part of the gradients, which a step makes less progress with: only where asked for."""
OURS |= FLAT | KEPT | {"GlobalQSGD 16 bits": {"bits": 16}, AUTO: {"bits": "auto"}}
OF_AUTO = (FP32, "GlobalQSGD 16 bits", "GlobalQSGD 8 bits", "GlobalQSGD 4 bits per block")
"""The arms that ``bits="auto"`` chooses among, on nodes of one rank."""
FLAT_OF_AUTO = tuple(f"{name} flat" for name in OF_AUTO[1:])
"""Those that it has in addition on nodes of several ranks, where those above go by node."""
DDP_ARMS = ("DDP fp32", "DDP fp16", "DDP PowerSGD rank 4", "DDP GlobalQSGD 8 bits", AUTO_DDP)

FSDP_FP32, FSDP_BF16 = "FSDP2 fp32", "FSDP2 bf16 gradients"
FSDP_OURS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "FSDP2 GlobalQSGD 8 bits": ({"bits": 8}, {}),
    "FSDP2 GlobalQSGD 4 bits": ({"bits": 4}, {}),
    "FSDP2 GlobalQSGD 4 bits per block": ({"bits": BlockBits(4)}, {}),
    "FSDP2 GlobalQSGD exponential": ({"dither": "exponential"}, {}),
    "FSDP2 GlobalQSGD 8 bits and weights": ({"bits": 8}, {"weight_bits": 8}),
}
"""Options of ``GlobalQSGD`` and of its ``fsdp``, by the arm's name."""
FSDP_ARMS = (FSDP_FP32, FSDP_BF16, *FSDP_OURS)

ARMS = (FP32, FP16, *OURS, *DDP_ARMS, *FSDP_ARMS)
"""The arms of ``hvd-gqsgd bench step``."""
