"""What a measurement ran on: processor, instruction set, and the commit of this package."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from hvd_gqsgd import build_info
from hvd_gqsgd._native import ops

__all__ = ["machine", "processor"]

ROOT = Path(__file__).parents[2]


def processor() -> str:
    """The name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The processor, the instruction set of the kernels, and the commit, or else the version."""
    return {
        "processor": processor(),
        "instruction_set": ops.instruction_set(),
        "commit": _commit() or f"version {build_info()['version']}",
    }


def _commit() -> str:
    """Empty outside of a clone; with a plus sign if files differ from the commit."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
