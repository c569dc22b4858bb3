"""What benchmarks compare: names without commas, and the options of ``GlobalQSGD``."""

from __future__ import annotations

from typing import Any

__all__ = ["OPERATORS"]

OPERATORS: dict[str, dict[str, Any]] = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "8 bits two-phase": {"bits": 8, "exchange": "two_phase"},
    "exponential": {"dither": "exponential"},
}
